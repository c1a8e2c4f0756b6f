"""From a ``config.json`` of the Hugging Face Hub to an architecture.

What a file leaves out is as the transformers library takes it, family by family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from serving.models.architecture import Architecture, FeedForward, Layer, UnreadArchitecture, Weight
from serving.models.hf_encoders import encoder_of
from serving.models.hf_families import Family, family_of
from serving.models.hf_feed_forward import experts, feed_forward
from serving.models.hf_keys import Keys
from serving.models.hf_mixers import attention, mamba2, mixers


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a ``config.json`` describes; raises :class:`UnreadArchitecture`."""
    keys = Keys(config)
    encoder = encoder_of(keys)
    if encoder is not None:
        return encoder
    family = family_of(keys.model_type)
    width = keys.number("hidden_size")
    return Architecture(
        family=family.gguf_name,
        width=width,
        vocabulary=keys.number("vocab_size", default=family.vocabulary),
        context_length=keys.number("max_position_embeddings", default=family.context_length),
        layers=_layers(family, keys, width),
        has_tied_embeddings=keys.flag("tie_word_embeddings", default=family.is_tied),
        weights_beside_layers=(Weight("output_norm.weight", (width,)),),
    )


def _layers(family: Family, keys: Keys, width: int) -> tuple[Layer, ...]:
    norms = tuple(Weight(f"{name}.weight", (width,)) for name in family.norms)
    if family.has_layer_scale:
        norms += (Weight("layer_output_scale.weight", (1,)),)
    if pattern := keys.text("hybrid_override_pattern"):
        return tuple(_single_part_layer(kind, family, keys, width, norms) for kind in pattern)
    return tuple(
        Layer(mixer, feed_forward(family, keys, width, index), norms)
        for index, mixer in enumerate(mixers(family, keys, width))
    )


def _single_part_layer(
    kind: str, family: Family, keys: Keys, width: int, norms: tuple[Weight, ...]
) -> Layer:
    """Nemotron-H has each part in a block of its own, spelled in letters."""
    match kind:
        case "M":
            return Layer(mamba2(keys, width), None, norms)
        case "*":
            return Layer(attention(family, keys), None, norms)
        case "E":
            return Layer(None, replace(experts(family, keys, width), is_gated=False), norms)
        case "-":
            return Layer(None, FeedForward(keys.number("intermediate_size"), is_gated=False), norms)
    raise UnreadArchitecture(f"its hybrid_override_pattern has a {kind!r}, which is not known here")
