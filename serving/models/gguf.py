"""Reads a GGUF file's header: what it says of itself and its tensors, and whether it was cut short."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MOST_DIMENSIONS = 4

# ``enum gguf_type`` of gguf.h, as codes of the struct module; the file is little-endian.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


class GgufError(Exception):
    """A file is no whole GGUF file; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Value:
    """An entry of the metadata. ``kind`` is of ``enum gguf_type``; ``data`` None stands for an array."""

    kind: int
    data: int | float | str | None

    @property
    def is_float32(self) -> bool:
        """Whether llama.cpp may read it as a 32-bit float."""
        return self.kind == _FLOAT32


@dataclass(frozen=True, slots=True)
class Tensor:
    """``shape`` begins with the dimension that is contiguous; ``type`` is of ``enum ggml_type``."""

    shape: tuple[int, ...]
    type: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensors' data, which begins at ``data_offset_bytes``."""

    values: Mapping[str, Value]
    tensors: Mapping[str, Tensor]
    data_offset_bytes: int

    def text(self, key: str) -> str | None:
        """A string of the metadata; None if it is not there or no string."""
        value = self.values.get(key)
        return value.data if value is not None and isinstance(value.data, str) else None

    def integer(self, key: str) -> int | None:
        """An integer of the metadata; None if it is not there or no integer."""
        value = self.values.get(key)
        return value.data if value is not None and isinstance(value.data, int) else None

    @property
    def file_type(self) -> int | None:
        """``general.file_type``, of ``enum llama_ftype``."""
        return self.integer("general.file_type")


def read_header(path: Path) -> Header:
    """The header of a file that reaches to its last tensor; raises :class:`GgufError` and OSError."""
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
        if not magic:
            raise GgufError("it is empty")
        if magic != _MAGIC:
            raise GgufError(f"it is not a GGUF file (it begins with {magic!r})")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()


class _Reader:
    """Walks the header once, front to back."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = len(_MAGIC)

    def header(self) -> Header:
        version = self._integer("I")
        if version not in _VERSIONS:
            raise GgufError(f"it has GGUF version {version}; versions 2 and 3 can be read")
        tensor_count, entries = self._integer("Q"), self._integer("Q")
        values: dict[str, Value] = {}
        for _ in range(entries):
            key, kind = self._string(), self._integer("I")
            values[key] = Value(kind, self._value(kind))
        tensors: dict[str, Tensor] = {}
        for _ in range(tensor_count):
            name, dimensions = self._string(), self._integer("I")
            if dimensions > _MOST_DIMENSIONS:
                raise GgufError(f"its header is damaged (tensor of {dimensions} dimensions)")
            shape = tuple(self._integer("Q") for _ in range(dimensions))
            tensors[name] = Tensor(shape, self._integer("I"), self._integer("Q"))
        header = Header(values, tensors, 0)
        if tensors:
            alignment = header.integer("general.alignment") or _DEFAULT_ALIGNMENT
            self._skip(-self._position % alignment)
            header = Header(values, tensors, self._position)
            self._skip(max(tensor.offset_bytes for tensor in tensors.values()) + 1)
        return header

    def _value(self, kind: int) -> int | float | str | None:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise GgufError(f"its header is damaged (value of type {kind})")
        item_kind, count = self._integer("I"), self._integer("Q")
        if item_kind in _SCALARS:
            self._skip(struct.calcsize(_SCALARS[item_kind]) * count)
        elif item_kind == _STRING:
            for _ in range(count):
                self._skip(self._integer("Q"))
        else:
            raise GgufError(f"its header is damaged (array of type {item_kind})")
        return None

    def _string(self) -> str:
        length = self._integer("Q")
        start = self._position
        self._skip(length)
        return self._data[start : self._position].decode("utf-8", errors="replace")

    def _integer(self, code: str) -> int:
        return int(self._scalar(code))

    def _scalar(self, code: str) -> int | float:
        start = self._position
        self._skip(struct.calcsize(code))
        value: int | float = struct.unpack_from(f"<{code}", self._data, start)[0]
        return value

    def _skip(self, size_bytes: int) -> None:
        self._position += size_bytes
        if self._position > len(self._data):
            raise GgufError(f"it ends early, after {len(self._data)} bytes; fetch it again")
