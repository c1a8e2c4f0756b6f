"""Where GGUF files of models of the catalog are published: those that are known to be there under these names."""

from __future__ import annotations

from collections.abc import Mapping

_QWEN_MIXTURES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
# By name of the catalog: the file, with {mixture} in it, and which mixtures there are.
_FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{
        f"qwen3-{size.casefold()}": (
            f"hf://Qwen/Qwen3-{size}-GGUF/Qwen3-{size}-{{mixture}}.gguf",
            _QWEN_MIXTURES,
        )
        for size in ("4B", "8B", "14B", "32B", "30B-A3B")
    },
    "gpt-oss-20b": (
        "hf://lmstudio-community/gpt-oss-20b-GGUF/gpt-oss-20b-MXFP4.gguf",
        ("MXFP4_MOE",),
    ),
    "llama-3.3-70b-instruct": (
        "hf://bartowski/Llama-3.3-70B-Instruct-GGUF/Llama-3.3-70B-Instruct-{mixture}.gguf",
        ("Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
    ),
}

# Those that Qwen publishes in AWQ's 4 bits, beside the 16-bit ones.
_AWQ_REPOSITORIES: Mapping[str, str] = {
    **{f"qwen3-{size.casefold()}": f"Qwen/Qwen3-{size}-AWQ" for size in ("4B", "8B", "14B", "32B")},
    **{
        f"qwen2.5-{size.casefold()}-instruct": f"Qwen/Qwen2.5-{size}-Instruct-AWQ"
        for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
    },
}


def awq_source_of(name: str) -> str | None:
    """A ``source`` for vLLM, of a model whose layers are in 4 bits; None if none is known."""
    repository = _AWQ_REPOSITORIES.get(name)
    return None if repository is None else f"hf://{repository}"


def source_of(name: str, mixture: str) -> tuple[str, str | None] | None:
    """A ``source`` for a config, and the ``quantization`` to make of it if it is not published so; None if unknown."""
    known = _FILES.get(name)
    if known is None:
        return None
    file, mixtures = known
    if mixture in mixtures:
        return file.format(mixture=mixture), None
    if "Q8_0" not in mixtures or mixture in ("BF16", "F16"):
        return None
    return file.format(mixture="Q8_0"), mixture
