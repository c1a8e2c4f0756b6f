"""The feed-forward networks of a ``config.json``: dense, or a mixture of experts."""

from __future__ import annotations

from serving.models.architecture import Experts, FeedForward, Weight
from serving.models.hf_families import Family
from serving.models.hf_keys import Keys

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ROUNDED_TO = 256


def feed_forward(family: Family, keys: Keys, width: int, index: int) -> FeedForward | Experts:
    """The network of the layer at ``index``."""
    if keys.optional(*_EXPERT_COUNTS) and _has_experts(keys, index):
        return experts(family, keys, width)
    inner = keys.number("intermediate_size_mlp", "intermediate_size", "block_ff_dim")
    if keys.flag("block_auto_adjust_ff_dim"):
        inner = -(-(2 * inner // 3) // _ROUNDED_TO) * _ROUNDED_TO
    return FeedForward(inner)


def _has_experts(keys: Keys, index: int) -> bool:
    if index < (keys.optional("first_k_dense_replace") or 0):
        return False
    step = keys.optional("interleave_moe_layer_step", "decoder_sparse_step", "moe_layer_freq") or 1
    return (index + 1) % step == 0 and index not in keys.numbers("mlp_only_layers")


def experts(family: Family, keys: Keys, width: int) -> Experts:
    """A mixture of experts, with those that all tokens share."""
    count = keys.number(*_EXPERT_COUNTS)
    inner = keys.number("moe_intermediate_size", "intermediate_size")
    weights: list[Weight] = []
    match family.model_type:
        case "qwen3_next" | "qwen3_5_moe":
            weights.append(Weight("ffn_gate_inp_shexp.weight", (width,)))
        case "gpt_oss":
            weights += [
                Weight("ffn_gate_inp.bias", (count,)),
                Weight("ffn_gate_exps.bias", (inner, count), count),
                Weight("ffn_up_exps.bias", (inner, count), count),
                Weight("ffn_down_exps.bias", (width, count), count),
            ]
        case "gemma4":
            weights += [
                Weight("ffn_gate_inp.scale", (width,)),
                Weight("ffn_down_exps.scale", (count,), count),
                *(
                    Weight(f"{name}.weight", (width,))
                    for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")
                ),
            ]
        case "deepseek_v3" | "kimi_k2" | "glm4_moe" | "glm4_moe_lite" | "minimax_m2" | "nemotron_h":
            weights.append(Weight("exp_probs_b.bias", (count,)))
    return Experts(
        count=count,
        active=keys.number("num_experts_per_tok", "experts_per_token", "top_k_experts"),
        width=inner,
        shared_width=_shared_width(family, keys, inner),
        weights=tuple(weights),
    )


def _shared_width(family: Family, keys: Keys, inner: int) -> int:
    if family.model_type == "llama4":
        return inner
    if family.model_type == "gemma4":  # its dense network, which runs beside the experts
        return keys.number("intermediate_size")
    each = keys.optional("moe_shared_expert_intermediate_size")
    shared = keys.optional("shared_expert_intermediate_size")
    if shared is not None:
        return shared
    return (keys.optional("n_shared_experts") or 0) * (each or inner)
