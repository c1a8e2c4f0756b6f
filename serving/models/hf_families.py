"""The families of models that the transformers library has, and how each differs from Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.models.architecture import UnreadArchitecture

# Norms of queries and keys: one that all heads share, or one as wide as all heads together.
HeadNorms = Literal["none", "shared", "wide"]


@dataclass(frozen=True, slots=True)
class Family:
    """A family, by its ``model_type`` and by what llama.cpp calls it.

    ``norms`` are those of a block that are as wide as the model. The last fields are what a
    ``config.json`` may leave out; None: it must not.
    """

    model_type: str
    gguf_name: str
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    has_qkv_bias: bool = False
    # Whether attention_bias is about the output, too.
    has_output_bias: bool = True
    head_norms: HeadNorms = "none"
    has_sinks: bool = False
    has_layer_scale: bool = False
    # Each second, sixth … layer sees everything, the others a window.
    global_interval: int | None = None
    is_tied: bool = False
    heads: int | None = None
    kv_heads: int | None = None
    head_width: int | None = None
    vocabulary: int | None = None
    context_length: int | None = None


_SANDWICH = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
_POST = ("attn_norm", "post_attention_norm")

_FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "llama"),
        Family("mistral", "llama"),
        Family("ministral3", "mistral3"),
        Family("mixtral", "llama"),
        Family("qwen2", "qwen2", has_qkv_bias=True),
        Family("qwen3", "qwen3", head_norms="shared"),
        Family("qwen2_5_vl", "qwen2vl", has_qkv_bias=True),
        Family("qwen3_vl", "qwen3vl", head_norms="shared"),
        Family("qwen3_vl_moe", "qwen3vlmoe", head_norms="shared"),
        Family("qwen3_moe", "qwen3moe", head_norms="shared"),
        Family("qwen3_next", "qwen3next", norms=_POST, head_norms="shared"),
        Family("qwen3_5", "qwen35", norms=_POST, head_norms="shared"),
        Family("qwen3_5_moe", "qwen35moe", norms=_POST, head_norms="shared"),
        Family(
            "gemma2", "gemma2", norms=_SANDWICH, global_interval=2, is_tied=True, head_width=256
        ),
        Family(
            "gemma3",
            "gemma3",
            norms=_SANDWICH,
            head_norms="shared",
            global_interval=6,
            is_tied=True,
            heads=8,
            kv_heads=4,
            head_width=256,
            vocabulary=262208,
            context_length=131072,
        ),
        Family(
            "gemma4",
            "gemma4",
            norms=_SANDWICH,
            has_layer_scale=True,
            head_norms="shared",
            is_tied=True,
        ),
        Family(
            "gemma4_unified",
            "gemma4",
            norms=_SANDWICH,
            has_layer_scale=True,
            head_norms="shared",
            is_tied=True,
        ),
        Family("phi3", "phi3"),
        Family("smollm3", "smollm3", is_tied=True),
        Family("olmo2", "olmo2", norms=("post_attention_norm", "post_ffw_norm"), head_norms="wide"),
        Family("glm4", "glm4", norms=_SANDWICH, has_output_bias=False),
        Family("glm4_moe", "glm4moe", norms=_POST, has_output_bias=False),
        Family("gpt_oss", "gpt-oss", norms=_POST, has_sinks=True),
        Family("llama4", "llama4", global_interval=4),
        Family("deepseek_v2", "deepseek2"),
        Family("deepseek_v3", "deepseek2"),
        Family("kimi_k2", "deepseek2"),
        Family("glm4_moe_lite", "deepseek2"),
        Family("minimax_m2", "minimax-m2", head_norms="wide"),
        Family("granite", "granite"),
        Family("nemotron_h", "nemotron_h_moe", norms=("attn_norm",)),
        Family("lfm2", "lfm2", head_norms="shared", is_tied=True),
        Family("seed_oss", "seed_oss", norms=_POST, has_output_bias=False),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``, with or without ``_text`` at its end; raises :class:`UnreadArchitecture`."""
    family = _FAMILIES.get(model_type.removesuffix("_text"))
    if family is None:
        raise UnreadArchitecture(f"its model_type {model_type!r} is not known here")
    return family
