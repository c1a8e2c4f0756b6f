"""What a model is made of: layers and the weights they hold. Sizes and counts are derived from these.

A weight has the name that llama.cpp gives it in a GGUF file, and its shape in that order, the contiguous
dimension first, so that what is said of an architecture and of a file can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod


class UnreadArchitecture(Exception):
    """An architecture cannot be told from what is there; the message says what is missing or unknown."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a model; ``of_experts`` says how many experts share it out (1: it is used for every token)."""

    name: str
    shape: tuple[int, ...]
    of_experts: int = 1

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention with grouped queries: ``kv_heads`` of keys and values serve ``heads`` of queries.

    ``window_tokens`` is how far back it looks (None: to the beginning). ``weights`` are those beside the
    four projections: biases, norms of heads, sinks.
    """

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window_tokens: int | None = None
    # Llama 4's: tokens see only those of their own chunk.
    is_chunked: bool = False
    has_output_gate: bool = False
    # Gemma 4's global layers take their values from the keys' projection.
    values_are_keys: bool = False
    weights: tuple[Weight, ...] = ()

    @property
    def cache_elements(self) -> int:
        """Keys and values of one token, as numbers."""
        return self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek's MLA): a token's keys and values are kept as one short vector.

    ``query_rank`` None: queries are not compressed. Widths are those of one head.
    """

    heads: int
    query_rank: int | None
    kv_rank: int
    nope_width: int
    rope_width: int
    value_width: int
    weights: tuple[Weight, ...] = ()

    @property
    def cache_elements(self) -> int:
        """The latent vector and the rotated key of one token, as numbers."""
        return self.kv_rank + self.rope_width


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A layer with a state of fixed size in place of a cache: Mamba, gated delta net, short convolution.

    ``state_elements`` and ``convolution_elements`` are what one sequence keeps, as numbers.
    """

    kind: str
    state_elements: int
    convolution_elements: int
    weights: tuple[Weight, ...]


Mixer = Attention | LatentAttention | Recurrent


@dataclass(frozen=True, slots=True)
class FeedForward:
    """A dense feed-forward network; ``is_gated`` has three matrices, else two."""

    width: int
    is_gated: bool = True
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of ``count`` experts, ``active`` of them for each token, and ``shared_width`` for all tokens."""

    count: int
    active: int
    width: int
    shared_width: int = 0
    is_gated: bool = True
    weights: tuple[Weight, ...] = ()


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. Either part may be missing, as in models that have them in blocks of their own.

    ``stored_weights`` are all of its weights where a file tells them; else they follow from its parts.
    """

    mixer: Mixer | None
    feed_forward: FeedForward | Experts | None
    norms: tuple[Weight, ...] = ()
    stored_weights: tuple[Weight, ...] = ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A language model's text part, without projectors of images and without layers for drafting tokens.

    ``family`` is llama.cpp's name for it where it has one (``general.architecture``), such as ``qwen3moe``.
    ``weights_beside_layers`` are those beyond the token embeddings and the output matrix.
    """

    family: str
    width: int
    vocabulary: int
    context_length: int
    layers: tuple[Layer, ...]
    has_tied_embeddings: bool
    weights_beside_layers: tuple[Weight, ...] = ()
    # Embedding models: they read a text whole and keep no cache.
    is_encoder: bool = False

    def weights(self) -> Iterator[Weight]:
        """All weights, in a GGUF file's names: ``blk.0.attn_q.weight``."""
        yield Weight("token_embd.weight", (self.width, self.vocabulary))
        if not self.has_tied_embeddings:
            yield Weight("output.weight", (self.width, self.vocabulary))
        yield from self.weights_beside_layers
        for index, layer in enumerate(self.layers):
            for weight in _layer_weights(layer, self.width):
                yield replace(weight, name=f"blk.{index}.{weight.name}")

    @property
    def parameters(self) -> int:
        """How many numbers all weights hold."""
        return sum(weight.elements for weight in self.weights())

    @property
    def active_parameters(self) -> int:
        """How many of them one token is computed with, the embeddings of all tokens counted in."""
        active = max(
            (
                layer.feed_forward.active
                for layer in self.layers
                if isinstance(layer.feed_forward, Experts)
            ),
            default=1,
        )
        return sum(
            weight.elements
            if weight.of_experts == 1
            else weight.elements * active // weight.of_experts
            for weight in self.weights()
        )


def _layer_weights(layer: Layer, width: int) -> Iterable[Weight]:
    if layer.stored_weights:
        yield from layer.stored_weights
        return
    yield from layer.norms
    match layer.mixer:
        case Attention() as attention:
            yield from _attention_weights(attention, width)
        case LatentAttention() as attention:
            yield from _latent_weights(attention, width)
        case Recurrent(weights=weights):
            yield from weights
    match layer.feed_forward:
        case FeedForward() as dense:
            yield from _feed_forward_weights(dense.width, width, "", is_gated=dense.is_gated)
            yield from dense.weights
        case Experts() as experts:
            yield from _expert_weights(experts, width)


def _attention_weights(attention: Attention, width: int) -> Iterable[Weight]:
    queries = attention.heads * attention.key_width * (2 if attention.has_output_gate else 1)
    yield Weight("attn_q.weight", (width, queries))
    yield Weight("attn_k.weight", (width, attention.kv_heads * attention.key_width))
    if not attention.values_are_keys:
        yield Weight("attn_v.weight", (width, attention.kv_heads * attention.value_width))
    yield Weight("attn_output.weight", (attention.heads * attention.value_width, width))
    yield from attention.weights


def _latent_weights(attention: LatentAttention, width: int) -> Iterable[Weight]:
    queries = attention.heads * (attention.nope_width + attention.rope_width)
    if attention.query_rank is None:
        yield Weight("attn_q.weight", (width, queries))
    else:
        yield Weight("attn_q_a.weight", (width, attention.query_rank))
        yield Weight("attn_q_a_norm.weight", (attention.query_rank,))
        yield Weight("attn_q_b.weight", (attention.query_rank, queries))
    yield Weight("attn_kv_a_mqa.weight", (width, attention.kv_rank + attention.rope_width))
    yield Weight("attn_kv_a_norm.weight", (attention.kv_rank,))
    yield Weight("attn_k_b.weight", (attention.nope_width, attention.kv_rank, attention.heads))
    yield Weight("attn_v_b.weight", (attention.kv_rank, attention.value_width, attention.heads))
    yield Weight("attn_output.weight", (attention.heads * attention.value_width, width))
    yield from attention.weights


def _feed_forward_weights(
    inner: int, width: int, suffix: str, *, is_gated: bool
) -> Iterable[Weight]:
    if is_gated:
        yield Weight(f"ffn_gate{suffix}.weight", (width, inner))
    yield Weight(f"ffn_up{suffix}.weight", (width, inner))
    yield Weight(f"ffn_down{suffix}.weight", (inner, width))


def _expert_weights(experts: Experts, width: int) -> Iterable[Weight]:
    yield Weight("ffn_gate_inp.weight", (width, experts.count))
    for weight in _feed_forward_weights(experts.width, width, "_exps", is_gated=experts.is_gated):
        yield Weight(weight.name, (*weight.shape, experts.count), experts.count)
    if experts.shared_width:
        yield from _feed_forward_weights(
            experts.shared_width, width, "_shexp", is_gated=experts.is_gated
        )
    yield from experts.weights
