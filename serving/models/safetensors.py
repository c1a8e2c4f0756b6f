"""Reads the header of a safetensors file: the names, types, shapes and sizes of its tensors."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The format's own limit on a header.
_MOST_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8


class SafetensorsError(Exception):
    """A file is no whole safetensors file; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: ``type`` in the file's words, such as ``BF16`` or ``Q4_K``."""

    type: str
    shape: tuple[int, ...]
    size_bytes: int


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that reaches to its last one; raises :class:`SafetensorsError` and OSError."""
    with path.open("rb") as file:
        length = header_length(file.read(LENGTH_BYTES))
        tensors = parse_safetensors(file.read(length))
        needed = LENGTH_BYTES + length + sum(tensor.size_bytes for tensor in tensors.values())
        if path.stat().st_size < needed:
            raise SafetensorsError(
                f"it ends early, after {path.stat().st_size} bytes of {needed}; fetch it again"
            )
    return tensors


def header_length(beginning: bytes) -> int:
    """How long the header is, from the first :data:`LENGTH_BYTES` of a file."""
    if len(beginning) < LENGTH_BYTES:
        raise SafetensorsError("it is no safetensors file: it is too short")
    length = int(struct.unpack_from("<Q", beginning)[0])
    if length > _MOST_HEADER_BYTES:
        raise SafetensorsError("it is no safetensors file: its header would be longer than any is")
    return length


def parse_safetensors(header: bytes) -> dict[str, StoredTensor]:
    """The tensors that a header, without its length, describes."""
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        return {
            name: StoredTensor(
                type=str(entry["dtype"]),
                shape=tuple(int(size) for size in entry["shape"]),
                size_bytes=int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise SafetensorsError(f"its header is damaged ({error})") from error
