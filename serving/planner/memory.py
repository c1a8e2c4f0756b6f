"""How much memory a llama.cpp engine takes, and on which device: weights, cache, intermediate results, the rest.

It is meant to be too high rather than too low: a model that is let in and does not fit ends others. How it holds
against what llama.cpp says of itself is in ``docs/results/memory.md``; the equations are in ``docs/planning.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from serving.models.architecture import (
    Architecture,
    Attention,
    LatentAttention,
    Layer,
    Recurrent,
)
from serving.planner.compute_buffer import (
    compute_bytes,
    input_bytes,
    operand_bytes,
    output_bytes,
)
from serving.planner.quantization import row_bytes
from serving.planner.settings import Settings
from serving.planner.weights import ModelWeights

MIB = 2**20

# An engine's process before it has a model: Python (of ours), its libraries.
_PROCESS_BYTES = 96 * MIB
# Of each word of a vocabulary: llama.cpp's tables; and ours, with the grammars' tokenizer once a request has a schema.
_VOCABULARY_BYTES, _WORDS_BYTES = 320, 704
# Of each token of a text that a slot is at, and of the places where drafts are looked up.
_TOKEN_BYTES, _LOOKUP_BYTES = 64, 160
# What CUDA keeps on a card for each process, and the memory the process keeps for it.
_CUDA_CONTEXT_BYTES = 512 * MIB
# Images on their way through a projector.
_PROJECTOR_WORK_BYTES = 512 * MIB
_FLOAT_BYTES = 4
# llama.cpp keeps so many copies of a step's inputs where several cards work at once.
_PIPELINE_COPIES = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """Memory of one device, in bytes, by what it is for.

    ``overhead`` is the process's own, and the driver's. ``extras`` are adapters, a draft model, a projector.
    """

    weights: int = 0
    cache: int = 0
    compute: int = 0
    extras: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Parts) -> Parts:
        return Parts(
            *(getattr(self, field.name) + getattr(other, field.name) for field in fields(self))
        )


@dataclass(frozen=True, slots=True)
class Offload:
    """Which part of a model is on cards: the last ``layers`` of it, counting the output as one, all if None.

    ``experts_on_cpu`` is how many of the first layers leave their experts in main memory. ``shares`` are the cards',
    as llama.cpp splits layers: in proportion to them. None of them: everything is in main memory.
    """

    shares: tuple[float, ...] = ()
    layers: int | None = None
    experts_on_cpu: int = 0

    def on_cards(self, layers: int) -> int:
        """How many of a model's layers are on cards, the output counted in."""
        if not self.shares:
            return 0
        return layers + 1 if self.layers is None else min(self.layers, layers + 1)


@dataclass(frozen=True, slots=True)
class Extras:
    """Files that are loaded beside the model, in bytes, and a draft model with its own cache and results."""

    adapters_bytes: int = 0
    projector_bytes: int | None = None
    draft: Parts = Parts()

    @property
    def total_bytes(self) -> int:
        """What they take, images at work counted in."""
        projector = (
            0 if self.projector_bytes is None else self.projector_bytes + _PROJECTOR_WORK_BYTES
        )
        return self.adapters_bytes + projector + self.draft.total


NO_EXTRAS = Extras()
IN_MAIN_MEMORY = Offload()


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine takes of main memory, and of each card."""

    host: Parts
    cards: tuple[Parts, ...] = ()

    @property
    def total(self) -> Parts:
        """All devices together."""
        return sum(self.cards, self.host)


def memory_of(
    architecture: Architecture,
    weights: ModelWeights,
    settings: Settings,
    offload: Offload = IN_MAIN_MEMORY,
    extras: Extras = NO_EXTRAS,
) -> Memory:
    """What an engine takes with a model, its settings, and a split of the model over devices."""
    where = places(len(architecture.layers), offload)
    host = Parts(
        weights=weights.embedding_bytes,
        compute=output_bytes(architecture, settings),
        overhead=process_bytes(architecture, settings),
    )
    cards = [Parts() for _ in offload.shares]
    for index, (layer, sizes) in enumerate(zip(architecture.layers, weights.layers, strict=True)):
        place = where[index]
        cache = Parts(cache=cache_bytes(layer, architecture, settings))
        if place is None:
            host += cache + Parts(weights=sizes.total_bytes)
            continue
        on_cpu = sizes.expert_bytes if index < offload.experts_on_cpu else 0
        cards[place] += cache + Parts(weights=sizes.total_bytes - on_cpu)
        host += Parts(weights=on_cpu)
    output = where[-1]
    if output is None:
        own_output = weights.output_bytes - (weights.embedding_bytes if weights.is_tied else 0)
        host += Parts(weights=own_output)
    else:
        cards[output] += Parts(weights=weights.output_bytes)
    host, cards = _with_results(architecture, settings, offload, where, host, cards)
    first = output if output is not None else next((at for at in where if at is not None), None)
    if first is None:
        host += Parts(extras=extras.total_bytes)
    else:
        cards[first] += Parts(extras=extras.total_bytes)
    return Memory(host, tuple(cards))


def _with_results(
    architecture: Architecture,
    settings: Settings,
    offload: Offload,
    where: Sequence[int | None],
    host: Parts,
    cards: list[Parts],
) -> tuple[Parts, list[Parts]]:
    """Adds what intermediate results take, and what a card costs to use at all."""
    used = {place for place in where if place is not None}
    if not used:
        results = compute_bytes(architecture, settings) + operand_bytes(architecture, settings)
        return host + Parts(compute=results), cards
    is_split = None in where or offload.experts_on_cpu > 0
    copies = _PIPELINE_COPIES if len(used) > 1 and not is_split else 1
    inputs = input_bytes(architecture, settings)
    for card in used:
        results = compute_bytes(architecture, settings, has_output=card == where[-1])
        cards[card] += Parts(compute=results + (copies - 1) * inputs, overhead=_CUDA_CONTEXT_BYTES)
    of_host = inputs
    if is_split:
        of_host = compute_bytes(architecture, settings, has_output=where[-1] is None)
        host += Parts(compute=operand_bytes(architecture, settings))
    return host + Parts(compute=copies * of_host, overhead=_CUDA_CONTEXT_BYTES), cards


def process_bytes(architecture: Architecture, settings: Settings) -> int:
    """What an engine's process takes beside llama.cpp's buffers: itself, its vocabulary, the texts that slots are at."""
    of_token = _TOKEN_BYTES + (_LOOKUP_BYTES if settings.has_lookup else 0)
    return (
        _PROCESS_BYTES
        + vocabulary_bytes(architecture)
        + _WORDS_BYTES * architecture.vocabulary
        + of_token * settings.held_tokens
    )


def vocabulary_bytes(architecture: Architecture) -> int:
    """llama.cpp's tables of a model's vocabulary."""
    return _VOCABULARY_BYTES * architecture.vocabulary


def cache_bytes(layer: Layer, architecture: Architecture, settings: Settings) -> int:
    """What one layer keeps of all sequences: keys and values, or a state."""
    match layer.mixer:
        case Attention() as attention if not architecture.is_encoder:
            cells = settings.streams * settings.cells_of(attention.window_tokens)
            keys = row_bytes(settings.key_type, attention.kv_heads * attention.key_width)
            width = attention.kv_heads * attention.value_width
            if not settings.has_flash_attention:
                width = _widest_values(architecture)  # all layers' rows are made as wide as that
            return cells * (keys + row_bytes(settings.value_type, width))
        case LatentAttention() as attention:
            cells = settings.streams * settings.cells
            return cells * row_bytes(settings.key_type, attention.cache_elements)
        case Recurrent() as recurrent:
            floats = recurrent.state_elements + recurrent.convolution_elements
            return settings.slots * floats * _FLOAT_BYTES
    return 0


def _widest_values(architecture: Architecture) -> int:
    mixers = (layer.mixer for layer in architecture.layers)
    return max(each.kv_heads * each.value_width for each in mixers if isinstance(each, Attention))


def places(layers: int, offload: Offload) -> list[int | None]:
    """The card of each layer, and of the output at the end; None is main memory. As llama.cpp shares them out."""
    on_cards = offload.on_cards(layers)
    first = layers + 1 - on_cards
    total = sum(offload.shares)
    ends: list[float] = []
    for share in offload.shares:
        ends.append((ends[-1] if ends else 0.0) + share / total)
    places: list[int | None] = []
    for layer in range(layers + 1):
        if layer < first:
            places.append(None)
        else:
            at = (layer - first) / on_cards
            places.append(
                next(card for card, end in enumerate(ends) if at < end or card == len(ends) - 1)
            )
    return places
