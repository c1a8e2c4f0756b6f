"""Where GGUF files of models of the catalog are published: those that are known to be there under these names."""

from __future__ import annotations

from collections.abc import Mapping

_QWENS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
_K_QUANTS = (*_QWENS, "Q3_K_M", "Q2_K")
_ALL = (*_QWENS, "IQ4_XS", "Q3_K_M", "Q2_K")
_UNSLOTH_2026 = (*_QWENS, "IQ4_XS", "Q3_K_M")
# A maker's repositories, with the model in {}, whose files are called as the model, and which mixtures there are; then
# the models. As xorbitsai/inference (llm_family.json) and menloresearch/model-catalog list them.
_REPOSITORIES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Qwen/{}-GGUF/{}", _QWENS, ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B", "Qwen3-30B-A3B")),
    ("LiquidAI/{}-GGUF/{}", _QWENS, ("LFM2-1.2B", "LFM2-2.6B")),
    ("ibm-granite/{}-GGUF/{}", _K_QUANTS, ("granite-3.3-8b-instruct",)),
    (
        "unsloth/{}-GGUF/{}",
        _ALL,
        (
            *("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B-Instruct-2507", "Qwen3-4B-Thinking-2507"),
            *("Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B-Thinking-2507"),
            *("Qwen3-Coder-30B-A3B-Instruct", "DeepSeek-R1-0528-Qwen3-8B"),
            *("Mistral-Small-3.2-24B-Instruct-2506", "Devstral-Small-2507"),
        ),
    ),
    (
        "unsloth/{}-GGUF/{}",
        _UNSLOTH_2026,
        (
            *("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B", "Qwen3.8-27B"),
            "gemma-4-31B-it",
        ),
    ),
    ("unsloth/{}-GGUF/{}", (*_QWENS, "Q3_K_M"), ("Qwen3.5-35B-A3B",)),
    ("unsloth/{}-GGUF/{}", ("Q8_0",), ("Qwen3.6-35B-A3B", "gemma-4-26B-A4B-it")),
    (
        "unsloth/{}-GGUF/{}",
        _K_QUANTS,
        (
            *("DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B"),
            *("DeepSeek-R1-Distill-Qwen-14B", "DeepSeek-R1-Distill-Qwen-32B"),
            *("DeepSeek-R1-Distill-Llama-8B", "phi-4"),
        ),
    ),
    (
        "bartowski/{}-GGUF/{}",
        _ALL,
        ("Qwen2.5-7B-Instruct", "Qwen2.5-14B-Instruct", "Qwen2.5-Coder-32B-Instruct"),
    ),
    ("bartowski/{}-GGUF/{}", (*_QWENS, "IQ4_XS"), ("Llama-3.2-3B-Instruct",)),
    (
        "bartowski/google_{}-GGUF/google_{}",
        _ALL,
        ("gemma-3-1b-it", "gemma-3-4b-it", "gemma-3-12b-it", "gemma-3-27b-it"),
    ),
    ("lmstudio-community/Meta-{}-GGUF/Meta-{}", (*_QWENS, "IQ4_XS"), ("Llama-3.1-8B-Instruct",)),
    ("lmstudio-community/{}-GGUF/{}", (*_QWENS, "IQ4_XS"), ("DeepSeek-Coder-V2-Lite-Instruct",)),
)  # fmt: skip
# By name of the catalog: the file, with {mixture} in it, and which mixtures there are.
_FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{
        model.casefold(): (f"hf://{path.format(model, model)}-{{mixture}}.gguf", mixtures)
        for path, mixtures, models in _REPOSITORIES
        for model in models
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
    model.casefold(): f"Qwen/{model}-AWQ"
    for model in (
        *(f"Qwen3-{size}" for size in ("4B", "8B", "14B", "32B")),
        *(f"Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
        *(f"Qwen2.5-Coder-{size}-Instruct" for size in ("1.5B", "3B", "7B", "14B", "32B")),
        "QwQ-32B",
    )
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
