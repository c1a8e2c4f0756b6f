"""Where a model's weights are, in bytes: by layer, those of experts apart; from its file, or as predicted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from serving.models.architecture import Architecture
from serving.models.gguf import Header
from serving.planner.quantization import stored_weights, types_of, weight_bytes

_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's: ``expert_bytes`` of them in experts, of which a token needs only some. Elements are numbers."""

    total_bytes: int = 0
    expert_bytes: int = 0
    elements: int = 0
    expert_elements: int = 0

    def __add__(self, other: LayerWeights) -> LayerWeights:
        return LayerWeights(
            self.total_bytes + other.total_bytes,
            self.expert_bytes + other.expert_bytes,
            self.elements + other.elements,
            self.expert_elements + other.expert_elements,
        )


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """``embedding_bytes`` are looked up, a row a token; ``output_bytes`` are the matrix that scores all tokens.

    With tied embeddings they are the same weights, and ``is_tied``.
    """

    embedding_bytes: int
    output_bytes: int
    layers: tuple[LayerWeights, ...]
    is_tied: bool

    @property
    def total_bytes(self) -> int:
        """All weights, as they are in the file."""
        own_output = self.output_bytes - (self.embedding_bytes if self.is_tied else 0)
        return self.embedding_bytes + own_output + sum(each.total_bytes for each in self.layers)


def predicted(architecture: Architecture, mixture: str) -> ModelWeights:
    """Those of a model in a mixture of quantizations, by the rules of llama.cpp."""
    types = types_of(architecture, mixture)
    return _sorted_out(
        len(architecture.layers),
        (
            (each.name, weight_bytes(each, types[each.name]), each.elements)
            for each in stored_weights(architecture)
        ),
    )


def of_files(parts: Iterable[tuple[Header, int]], layers: int) -> ModelWeights:
    """Those of a model's GGUF files, each with its size in bytes: a tensor reaches to the next, whatever its type.

    Layers beyond ``layers`` only draft tokens; llama.cpp leaves them in the file.
    """
    return _sorted_out(
        layers, (size for header, bytes_ in parts for size in _sizes(header, bytes_))
    )


def _sizes(header: Header, file_bytes: int) -> Iterator[tuple[str, int, int]]:
    by_place = sorted(header.tensors.items(), key=lambda each: each[1].offset_bytes)
    ends = [tensor.offset_bytes for _, tensor in by_place[1:]]
    ends.append(file_bytes - header.data_offset_bytes)
    for (name, tensor), end_bytes in zip(by_place, ends, strict=True):
        yield name, end_bytes - tensor.offset_bytes, prod(tensor.shape)


def layer_of(name: str) -> int:
    """The layer that a tensor is of; -1 for one beside them."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _sorted_out(layers: int, sizes: Iterable[tuple[str, int, int]]) -> ModelWeights:
    in_layers = [LayerWeights()] * layers
    embedding_bytes = output_bytes = 0
    has_output = False
    for name, size_bytes, elements in sizes:
        layer = layer_of(name)
        if layer >= layers:
            continue
        if layer >= 0:
            is_of_experts = "_exps." in name
            in_layers[layer] += LayerWeights(
                size_bytes, size_bytes * is_of_experts, elements, elements * is_of_experts
            )
        elif name.startswith("output") or name == "token_embd_norm.weight":
            output_bytes += size_bytes
            has_output = has_output or name == "output.weight"
        else:
            embedding_bytes += size_bytes
    return ModelWeights(
        embedding_bytes=embedding_bytes,
        output_bytes=output_bytes if has_output else output_bytes + embedding_bytes,
        layers=tuple(in_layers),
        is_tied=not has_output,
    )
