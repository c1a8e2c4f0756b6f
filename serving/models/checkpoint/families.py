"""The families of models that can be converted: what GGUF says of each, and what llama.cpp takes for granted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf

from serving.models.checkpoint.config import Config, UnfitCheckpoint
from serving.models.checkpoint.rope import Rope

_SILU = ("silu", "swish")
_GELU = ("gelu_pytorch_tanh", "gelu_new")
# Of llama.cpp's src/models/gemma{2,3}.cpp: the largest model of each generation scales attention otherwise.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_FULL_ATTENTION_EVERY = {"gemma2": 2, "gemma3": 6}

Check = Callable[[Config], None]
Write = Callable[[Config, gguf.GGUFWriter], None]


@dataclass(frozen=True, slots=True)
class Family:
    """``architecture`` is GGUF's name of it.

    ``norm_offset`` is added to the weights of norms, which Gemma saves as differences from 1. ``interleaves_heads``:
    the rows of query and key are in another order in GGUF files, each head's rotated pairs side by side.
    """

    architecture: str
    check: Check
    write: Write
    norm_offset: float = 0.0
    interleaves_heads: bool = False

    @property
    def kind(self) -> gguf.MODEL_ARCH:
        """As the gguf library numbers it."""
        return next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)


def family_of(config: Config) -> Family:
    """The family, which has been asked whether llama.cpp computes all of the config; raises :class:`UnfitCheckpoint`."""
    family = _FAMILIES.get(config.architecture)
    if family is None:
        raise UnfitCheckpoint(
            f"its architecture is {config.architecture}; {', '.join(sorted(_FAMILIES))} can be converted"
        )
    if config.get("quantization_config"):
        raise UnfitCheckpoint(
            "its weights are quantized (quantization_config); convert the model that they were made from"
        )
    family.check(config)
    return family


def write_parameters(
    config: Config, family: Family, rope: Rope, tokens: int, writer: gguf.GGUFWriter
) -> None:
    """Add what llama.cpp needs to know of the model besides its vocabulary and its tensors."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.layers)
    writer.add_context_length(_context_length(config, family))
    writer.add_embedding_length(config.integer("hidden_size"))
    writer.add_feed_forward_length(config.integer("intermediate_size"))
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.key_value_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.number("rms_norm_eps"))
    writer.add_rope_dimension_count(_rotated_width(config))
    writer.add_vocab_size(tokens)
    rope.write(writer)
    family.write(config, writer)


def _rotated_width(config: Config) -> int:
    parameters = config.get("rope_parameters") or {}
    share = config.get("partial_rotary_factor") or parameters.get("partial_rotary_factor") or 1.0
    return int(config.head_width * share)


def _context_length(config: Config, family: Family) -> int:
    """Up to where llama.cpp computes what the model does: it has sliding windows for Gemma only."""
    length = config.integer("max_position_embeddings")
    window = config.get("sliding_window")
    if (
        family.architecture in _FULL_ATTENTION_EVERY
        or window is None
        or config.get("use_sliding_window") is False
    ):
        return length
    return min(length, config.integer("sliding_window"))


def _silu(config: Config) -> None:
    config.require("hidden_act", *_SILU, why="llama.cpp computes this family with SiLU")


def _all_rotated(config: Config) -> None:
    _silu(config)
    if _rotated_width(config) != config.head_width:
        raise UnfitCheckpoint("partial_rotary_factor: llama.cpp rotates whole heads in this family")


def _smollm3(config: Config) -> None:
    _all_rotated(config)
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.layers)]
    if config.get("no_rope_layers") != expected:
        raise UnfitCheckpoint("no_rope_layers: llama.cpp has every fourth layer without positions")
    config.require("use_sliding_window", None, False, why="llama.cpp has no window here")


def _mixture(config: Config) -> None:
    _all_rotated(config)
    config.require("mlp_only_layers", None, [], why="llama.cpp has experts in all layers")
    config.require("decoder_sparse_step", None, 1, why="llama.cpp has experts in all layers")


def _qwen2_mixture(config: Config) -> None:
    _mixture(config)
    config.require("norm_topk_prob", None, False, why="llama.cpp does not normalize the weights")


def _qwen3_mixture(config: Config) -> None:
    _mixture(config)
    config.require("norm_topk_prob", True, why="llama.cpp normalizes the experts' weights")


def _gemma(config: Config) -> None:
    # The first configs of Gemma said hidden_act, and were computed with hidden_activation's default.
    if config.get("hidden_activation") is not None:
        config.require("hidden_activation", *_GELU, why="llama.cpp computes this family with GELU")
    config.require("tie_word_embeddings", None, True, why="llama.cpp has no output layer here")
    config.require(
        "use_bidirectional_attention", None, False, why="llama.cpp attends backwards only"
    )
    config.require("attention_bias", None, False, why="llama.cpp has no biases here")


def _gemma_with_windows(architecture: str) -> Check:
    every = _FULL_ATTENTION_EVERY[architecture]

    def check(config: Config) -> None:
        _gemma(config)
        kinds = [
            "sliding_attention" if (layer + 1) % every else "full_attention"
            for layer in range(config.layers)
        ]
        config.require(
            "layer_types", None, kinds, why=f"llama.cpp has full attention every {every}"
        )
        config.require(
            "sliding_window_pattern", None, every, why=f"llama.cpp computes with {every}"
        )
        width = config.head_width
        if config.layers == _LAYERS_OF_27B[architecture]:
            width = config.integer("hidden_size") // config.heads
        config.require(
            "query_pre_attn_scalar",
            width,
            why=f"llama.cpp computes a model of this shape with {width}",
        )
        if architecture == "gemma3":
            config.require("attn_logit_softcapping", None, why="llama.cpp has none in Gemma 3")

    return check


def _write_nothing(config: Config, writer: gguf.GGUFWriter) -> None:
    pass


def _write_experts(config: Config, writer: gguf.GGUFWriter) -> None:
    counts = (config.get(key) for key in ("num_local_experts", "num_experts"))
    writer.add_expert_count(next((count for count in counts if count), 0))
    writer.add_expert_used_count(config.integer("num_experts_per_tok"))
    if config.get("moe_intermediate_size") is not None:
        writer.add_expert_feed_forward_length(config.integer("moe_intermediate_size"))
    if config.get("shared_expert_intermediate_size") is not None:
        writer.add_expert_shared_feed_forward_length(
            config.integer("shared_expert_intermediate_size")
        )


def _write_gemma2(config: Config, writer: gguf.GGUFWriter) -> None:
    writer.add_attn_logit_softcapping(config.number("attn_logit_softcapping"))
    _write_gemma3(config, writer)


def _write_gemma3(config: Config, writer: gguf.GGUFWriter) -> None:
    if config.get("final_logit_softcapping") is not None:
        writer.add_final_logit_softcapping(config.number("final_logit_softcapping"))
    writer.add_sliding_window(config.integer("sliding_window"))


_LLAMA = Family("llama", _all_rotated, _write_nothing, interleaves_heads=True)
_GEMMA3 = Family("gemma3", _gemma_with_windows("gemma3"), _write_gemma3, norm_offset=1.0)
# By what transformers calls each.
_FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": Family("llama", _mixture, _write_experts, interleaves_heads=True),
    "SmolLM3ForCausalLM": Family("smollm3", _smollm3, _write_nothing, interleaves_heads=True),
    "Qwen2ForCausalLM": Family("qwen2", _all_rotated, _write_nothing),
    "Qwen2MoeForCausalLM": Family("qwen2moe", _qwen2_mixture, _write_experts),
    "Qwen3ForCausalLM": Family("qwen3", _all_rotated, _write_nothing),
    "Qwen3MoeForCausalLM": Family("qwen3moe", _qwen3_mixture, _write_experts),
    "GemmaForCausalLM": Family("gemma", _gemma, _write_nothing, norm_offset=1.0),
    "Gemma2ForCausalLM": Family(
        "gemma2", _gemma_with_windows("gemma2"), _write_gemma2, norm_offset=1.0
    ),
    "Gemma3ForCausalLM": _GEMMA3,
    "Gemma3ForConditionalGeneration": _GEMMA3,
    "Phi3ForCausalLM": Family("phi3", _silu, _write_nothing),
}
