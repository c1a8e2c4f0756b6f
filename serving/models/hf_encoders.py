"""Embedding models that read a text whole: BERT and its kin, from a ``config.json``."""

from __future__ import annotations

from serving.models.architecture import Architecture, Attention, FeedForward, Layer, Weight
from serving.models.hf_keys import Keys

_BERTS = {"bert": "bert", "xlm-roberta": "bert", "roberta": "bert", "nomic_bert": "nomic-bert"}


def encoder_of(keys: Keys) -> Architecture | None:
    """The architecture of an encoder; None if the file is of another kind of model."""
    name = _BERTS.get(keys.model_type)
    if name is None:
        return None
    is_nomic = keys.model_type == "nomic_bert"
    width = keys.number("hidden_size", "n_embd")
    heads = keys.number("num_attention_heads", "n_head")
    inner = keys.number("intermediate_size", "n_inner")
    context_length = keys.number("max_position_embeddings", "n_positions")
    beside = [
        *_norm("token_embd_norm", width),
        Weight("token_types.weight", (width, keys.number("type_vocab_size"))),
    ]
    if not is_nomic:  # it turns queries and keys instead
        beside.append(Weight("position_embd.weight", (width, context_length)))
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        key_width=width // heads,
        value_width=width // heads,
        weights=()
        if is_nomic
        else tuple(
            Weight(f"{part}.bias", (width,))
            for part in ("attn_q", "attn_k", "attn_v", "attn_output")
        ),
    )
    feed_forward = FeedForward(
        inner,
        is_gated=is_nomic,
        weights=()
        if is_nomic
        else (Weight("ffn_up.bias", (inner,)), Weight("ffn_down.bias", (width,))),
    )
    norms = (*_norm("attn_output_norm", width), *_norm("layer_output_norm", width))
    return Architecture(
        family=name,
        width=width,
        vocabulary=keys.number("vocab_size"),
        context_length=context_length,
        layers=(Layer(attention, feed_forward, norms),)
        * keys.number("num_hidden_layers", "n_layer"),
        has_tied_embeddings=True,
        weights_beside_layers=tuple(beside),
        is_encoder=True,
    )


def _norm(name: str, width: int) -> tuple[Weight, Weight]:
    return Weight(f"{name}.weight", (width,)), Weight(f"{name}.bias", (width,))
