"""Whether a file is a LoRA adapter of a model: asked before llama.cpp, which may end the process over it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serving.models.gguf import GgufError, Header, Tensor, read_header


class UnfitAdapter(Exception):
    """A file that is no adapter of the base model; the message says why."""


@dataclass(frozen=True, slots=True)
class _Type:
    """How a tensor is stored: in blocks of so many values and bytes, each of which begins with a float.

    That is a ``word``; it is infinite or not a number if all bits of the ``exponent`` are set.
    """

    values: int
    bytes: int
    word: str
    exponent: int


# Of ``enum ggml_type``, what adapters come in: F32, F16, Q8_0, BF16.
_TYPES = {
    0: _Type(1, 4, "<u4", 0x7F800000),
    1: _Type(1, 2, "<u2", 0x7C00),
    8: _Type(32, 34, "<u2", 0x7C00),
    30: _Type(1, 2, "<u2", 0x7F80),
}
_TOKEN_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


def check_adapter(path: Path, model_path: Path) -> None:
    """Read all of an adapter's file; raises :class:`UnfitAdapter` unless llama.cpp can apply it to the model.

    llama.cpp checks most of this itself, but some only by an assertion, which ends the process, and
    some not at all before the first batch.
    """
    if not path.is_file():
        raise UnfitAdapter("there is no such file")
    try:
        header = read_header(path)
    except (GgufError, OSError) as error:
        raise UnfitAdapter(error.strerror if isinstance(error, OSError) else error) from error
    _check_kind(header, read_header(model_path))
    _check_shapes(header.tensors, _tensors(model_path))
    _check_data(path, header)


def _check_kind(header: Header, base: Header) -> None:
    for key, expected in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", base.text("general.architecture")),
    ):
        value = header.values.get(key)
        found = "missing" if value is None else repr(value.data)
        if header.text(key) != expected:
            raise UnfitAdapter(f"its {key} is {found}; {expected!r} is needed here")
    if "adapter.alora.invocation_tokens" in header.values:
        raise UnfitAdapter("it is an activated LoRA (aLoRA), which this engine does not apply")
    alpha = header.values.get("adapter.lora.alpha")
    if alpha is not None and not (alpha.is_float32 and math.isfinite(float(alpha.data or 0))):
        raise UnfitAdapter(
            f"its adapter.lora.alpha is {alpha.data!r}; a finite 32-bit float is needed"
        )


def _tensors(model_path: Path) -> Mapping[str, Tensor]:
    """The tensors of a model, also of one whose file is split."""
    header = read_header(model_path)
    count = header.integer("split.count") or 1
    tensors = dict(header.tensors)
    for number in range(2, count + 1):
        part = re.sub(r"-00001(-of-\d+)", rf"-{number:05d}\1", model_path.name)
        tensors |= read_header(model_path.with_name(part)).tensors
    return tensors


def _check_shapes(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    targets = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}
    if not targets:
        raise UnfitAdapter("it has no tensors")
    for target in sorted(targets):
        if target in tensors:
            raise UnfitAdapter(
                f"its {target!r} is neither lora_a nor lora_b; llama.cpp leaves it out"
            )
        if target not in base:
            raise UnfitAdapter(f"it changes {target!r}, which the base model does not have")
        if len(base[target].shape) < 2:
            raise UnfitAdapter(f"it changes {target!r}; llama.cpp changes matrices only")
        a, b = tensors.get(f"{target}.lora_a"), tensors.get(f"{target}.lora_b")
        if a is None or b is None:
            raise UnfitAdapter(f"of {target!r} it has only one of lora_a and lora_b")
        if target == _TOKEN_EMBEDDING and _OUTPUT not in base:
            # The tensor is the output layer, too; llama.cpp would apply the change there the wrong way round.
            raise UnfitAdapter(
                f"it changes {target!r}, which this model shares with its output layer"
            )
        inputs, outputs, *experts = _four(base[target])[:3]
        rank = _four(b)[0]
        expected = (inputs, rank, *experts, 1), (rank, outputs, *experts, 1)
        if target == _TOKEN_EMBEDDING:
            expected = (rank, outputs, 1, 1), (rank, inputs, 1, 1)
        if (_four(a), _four(b)) != expected:
            raise UnfitAdapter(
                f"the shapes {list(a.shape)} and {list(b.shape)} of its {target!r} do not fit the base "
                f"model's {list(base[target].shape)}; it was made for another model"
            )


def _four(tensor: Tensor) -> tuple[int, ...]:
    """The shape with all of ggml's dimensions."""
    return (*tensor.shape, 1, 1, 1, 1)[:4]


def _check_data(path: Path, header: Header) -> None:
    data = np.memmap(path, np.uint8, "r")
    for name, tensor in header.tensors.items():
        kind = _TYPES.get(tensor.type)
        if kind is None:
            raise UnfitAdapter(
                f"its {name!r} is of type {tensor.type}; F32, F16, BF16 and Q8_0 can be used"
            )
        size_bytes = math.prod(tensor.shape) // kind.values * kind.bytes
        start = header.data_offset_bytes + tensor.offset_bytes
        if start + size_bytes > len(data):
            raise UnfitAdapter(f"it ends early, after {len(data)} bytes; fetch it again")
        words = data[start : start + size_bytes].view(kind.word)
        words = words[:: kind.bytes // words.itemsize]
        if np.any(words & kind.exponent == kind.exponent):
            raise UnfitAdapter(f"its {name!r} holds values that are infinite or not numbers")
