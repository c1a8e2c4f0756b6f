"""What lets the tokens of a text see each other: attention and recurrent states, from a ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

from serving.models.architecture import (
    Attention,
    LatentAttention,
    Mixer,
    Recurrent,
    UnreadArchitecture,
    Weight,
)
from serving.models.hf_families import Family
from serving.models.hf_keys import Keys


@dataclass(frozen=True, slots=True)
class _Sight:
    """How far back an attention looks; None: to the beginning."""

    window_tokens: int | None = None
    is_chunked: bool = False


_EVERYTHING = _Sight()


def mixers(family: Family, keys: Keys, width: int) -> list[Mixer]:
    """The mixer of each layer, in order."""
    count = keys.number("num_hidden_layers")
    kinds = keys.words("layer_types") or _kinds(family, keys, count)
    if len(kinds) != count:
        raise UnreadArchitecture(
            f"its config.json has {len(kinds)} layer_types for {count} num_hidden_layers"
        )
    return [_mixer(kind, family, keys, width) for kind in kinds]


def _kinds(family: Family, keys: Keys, count: int) -> list[str]:
    """What older files have in place of ``layer_types``: rules, which differ by family."""
    if interval := keys.optional("full_attention_interval"):
        return _patterned(count, interval, "linear_attention")
    if attending := keys.numbers("full_attn_idxs"):
        return ["full_attention" if index in attending else "conv" for index in range(count)]
    if family.model_type == "llama4":
        return _patterned(count, family.global_interval or 1, "chunked_attention")
    if keys.optional("sliding_window") is None or not keys.flag("use_sliding_window", default=True):
        return ["full_attention"] * count
    interval = keys.optional("sliding_window_pattern") or family.global_interval
    if interval:
        return _patterned(count, interval, "sliding_attention")
    first = keys.optional("max_window_layers") or 0
    return ["full_attention"] * first + ["sliding_attention"] * (count - first)


def _patterned(count: int, interval: int, others: str) -> list[str]:
    """The last of so many layers sees everything."""
    return [others if (index + 1) % interval else "full_attention" for index in range(count)]


def _mixer(kind: str, family: Family, keys: Keys, width: int) -> Mixer:
    context_length = keys.number("max_position_embeddings", default=family.context_length)
    match kind:
        case "full_attention" | "attention":
            return attention(family, keys, is_global=True)
        case "sliding_attention":
            window = keys.number("sliding_window")
            return attention(
                family, keys, _Sight(window) if window < context_length else _EVERYTHING
            )
        case "chunked_attention":
            return attention(
                family, keys, _Sight(keys.number("attention_chunk_size"), is_chunked=True)
            )
        case "linear_attention":
            return delta_net(keys, width)
        case "conv":
            return short_convolution(keys, width)
    raise UnreadArchitecture(f"its layer_types have a {kind!r}, which is not known here")


def attention(
    family: Family, keys: Keys, sight: _Sight = _EVERYTHING, *, is_global: bool = False
) -> Mixer:
    """The attention of a layer; latent where the file has ranks for it.

    Where layers differ, ``is_global`` is one of those without a window, which Gemma 4 has heads of their own for.
    """
    if keys.optional("kv_lora_rank") is not None:
        return LatentAttention(
            heads=keys.number("num_attention_heads"),
            query_rank=keys.optional("q_lora_rank"),
            kv_rank=keys.number("kv_lora_rank"),
            nope_width=keys.number("qk_nope_head_dim"),
            rope_width=keys.number("qk_rope_head_dim"),
            value_width=keys.number("v_head_dim"),
        )
    heads = keys.number("num_attention_heads", default=family.heads)
    kv_heads = keys.number("num_key_value_heads", default=family.kv_heads or heads)
    head_width = keys.number(
        "head_dim", default=family.head_width or keys.number("hidden_size") // heads
    )
    has_own_heads = is_global and keys.optional("num_global_key_value_heads") is not None
    if has_own_heads:
        kv_heads = keys.number("num_global_key_value_heads")
        head_width = keys.number("global_head_dim")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        key_width=head_width,
        value_width=head_width,
        values_are_keys=has_own_heads and keys.flag("attention_k_eq_v"),
        window_tokens=sight.window_tokens,
        is_chunked=sight.is_chunked,
        has_output_gate=keys.flag("attn_output_gate", default=family.model_type == "qwen3_next"),
        weights=(
            *_biases(family, keys, heads * head_width, kv_heads * head_width),
            *_head_norms(family, keys, heads, kv_heads, head_width),
            *([Weight("attn_sinks.weight", (heads,))] if family.has_sinks else []),
        ),
    )


def _biases(family: Family, keys: Keys, queries: int, keys_width: int) -> list[Weight]:
    if not keys.flag("attention_bias", default=family.has_qkv_bias):
        return []
    biases = [
        Weight("attn_q.bias", (queries,)),
        Weight("attn_k.bias", (keys_width,)),
        Weight("attn_v.bias", (keys_width,)),
    ]
    if family.has_output_bias and not family.has_qkv_bias:
        biases.append(Weight("attn_output.bias", (keys.number("hidden_size"),)))
    return biases


def _head_norms(
    family: Family, keys: Keys, heads: int, kv_heads: int, head_width: int
) -> list[Weight]:
    norms = family.head_norms
    if family.model_type == "glm4_moe" and keys.flag("use_qk_norm"):
        norms = "shared"
    match norms:
        case "none":
            return []
        case "shared":
            widths = (head_width, head_width)
        case "wide":
            widths = (heads * head_width, kv_heads * head_width)
    return [
        Weight("attn_q_norm.weight", (widths[0],)),
        Weight("attn_k_norm.weight", (widths[1],)),
    ]


def delta_net(keys: Keys, width: int) -> Recurrent:
    """A gated delta net, as in Qwen3-Next: one matrix a head as its state."""
    key_heads, value_heads = (
        keys.number("linear_num_key_heads"),
        keys.number("linear_num_value_heads"),
    )
    key_width, value_width = (
        keys.number("linear_key_head_dim"),
        keys.number("linear_value_head_dim"),
    )
    kernel = keys.number("linear_conv_kernel_dim")
    values = value_heads * value_width
    convolved = 2 * key_heads * key_width + values
    return Recurrent(
        kind="gated_delta_net",
        state_elements=value_heads * key_width * value_width,
        convolution_elements=(kernel - 1) * convolved,
        weights=(
            Weight("attn_qkv.weight", (width, convolved)),
            Weight("attn_gate.weight", (width, values)),
            Weight("ssm_beta.weight", (width, value_heads)),
            Weight("ssm_alpha.weight", (width, value_heads)),
            Weight("ssm_conv1d.weight", (kernel, convolved)),
            Weight("ssm_dt.bias", (value_heads,)),
            Weight("ssm_a", (value_heads,)),
            Weight("ssm_norm.weight", (value_width,)),
            Weight("ssm_out.weight", (values, width)),
        ),
    )


def mamba2(keys: Keys, width: int) -> Recurrent:
    """A Mamba-2 layer: one matrix a head as its state."""
    heads, head_width = keys.number("mamba_num_heads"), keys.number("mamba_head_dim")
    state, groups = keys.number("ssm_state_size"), keys.number("n_groups")
    kernel = keys.number("conv_kernel")
    inner = heads * head_width
    convolved = inner + 2 * groups * state
    return Recurrent(
        kind="mamba2",
        state_elements=inner * state,
        convolution_elements=(kernel - 1) * convolved,
        weights=(
            Weight("ssm_in.weight", (width, inner + convolved + heads)),
            Weight("ssm_conv1d.weight", (kernel, convolved)),
            Weight("ssm_conv1d.bias", (convolved,)),
            Weight("ssm_dt.bias", (heads,)),
            Weight("ssm_a", (1, heads)),
            Weight("ssm_d", (1, heads)),
            Weight("ssm_norm.weight", (inner // groups, groups)),
            Weight("ssm_out.weight", (inner, width)),
        ),
    )


def short_convolution(keys: Keys, width: int) -> Recurrent:
    """A gated convolution over the last few tokens, as in LFM2."""
    kernel = keys.number("conv_L_cache")
    return Recurrent(
        kind="short_convolution",
        state_elements=0,
        convolution_elements=(kernel - 1) * width,
        weights=(
            Weight("shortconv.in_proj.weight", (width, 3 * width)),
            Weight("shortconv.conv.weight", (kernel, width)),
            Weight("shortconv.out_proj.weight", (width, width)),
        ),
    )
