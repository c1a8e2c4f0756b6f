"""Reads safetensors files, as Hugging Face saves weights, without loading them: tensors stay on the disk until used."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Words = NDArray[Any]

# How a value is stored; BF16, the upper half of a 32-bit float, is a type that NumPy does not have.
_WORDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class SafetensorsError(Exception):
    """A file cannot be read as safetensors; the message says why."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file that is mapped into memory. ``dtype`` is ``F32``, ``F16`` or ``BF16``."""

    words: Words
    dtype: str

    def floats(self) -> Matrix:
        """All values as 32-bit floats."""
        return as_floats(self.words, self.dtype)


def as_floats(words: Words, dtype: str) -> Matrix:
    """Stored values as 32-bit floats."""
    if dtype == "BF16":
        return (words.astype("<u4") << 16).view("<f4")
    return words.astype(np.float32)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises :class:`SafetensorsError` and OSError."""
    if not path.stat().st_size:
        raise SafetensorsError(f"its {path.name} is empty; fetch it again")
    data = np.memmap(path, np.uint8, "r")
    try:
        (header_bytes,) = struct.unpack("<Q", bytes(data[:8]))
        start = 8 + header_bytes
        header: dict[str, Any] = json.loads(bytes(data[8:start]))
        header.pop("__metadata__", None)
        return {name: _tensor(data[start:], name, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SafetensorsError(f"its {path.name} is damaged ({error}); fetch it again") from error


def _tensor(data: Words, name: str, entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    kind = _WORDS.get(entry["dtype"])
    if kind is None:
        raise SafetensorsError(
            f"its {name!r} is of type {entry['dtype']}; F32, F16 and BF16 can be converted"
        )
    if end > len(data) or end - start != math.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError(f"{name!r} has {len(data[start:end])} bytes")
    return StoredTensor(data[start:end].view(kind).reshape(shape), entry["dtype"])


def read_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model that is saved in a folder, in one file or several; raises as :func:`read_safetensors`."""
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        tensors |= read_safetensors(path)
    return tensors


def _files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists() and list(folder.glob("pytorch_model*.bin")):
            raise SafetensorsError(
                "its weights are pickles (pytorch_model.bin), which may run programs; "
                "save it again with safe_serialization=True"
            )
        yield single
        return
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise SafetensorsError(f"its {index.name} is damaged ({error}); fetch it again") from error
    for name in sorted(names):
        if Path(name).name != name:
            raise SafetensorsError(f"its {index.name} names a file outside of the folder: {name}")
        yield folder / name
