"""Reads a GGUF file's header: what it says of itself and its tensors, and whether it was cut short.

The beginning of a file will do, as of one that is still elsewhere.
"""

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
# Longer arrays are tables of the vocabulary; shorter ones may tell a figure for each layer.
_MOST_ITEMS_KEPT = 2048

# ``enum gguf_type`` of gguf.h, as codes of the struct module; the file is little-endian.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_FLOAT32, _STRING, _ARRAY = 6, 8, 9


class GgufError(Exception):
    """A file is no whole GGUF file; the message says what is wrong with it."""


class HeaderCut(Exception):
    """The header does not end within what was given of the file."""


@dataclass(frozen=True, slots=True)
class Value:
    """An entry of the metadata. ``kind`` is of ``enum gguf_type``; ``data`` None stands for an array.

    ``items`` are those of a short array of numbers.
    """

    kind: int
    data: int | float | str | None
    items: tuple[int | float, ...] = ()

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

    def integers(self, key: str) -> tuple[int, ...]:
        """An integer of the metadata or a short array of them; empty if it is not there."""
        value = self.values.get(key)
        if value is None:
            return ()
        items = value.items if value.data is None else (value.data,)
        return tuple(item for item in items if isinstance(item, int))

    @property
    def file_type(self) -> int | None:
        """``general.file_type``, of ``enum llama_ftype``."""
        return self.integer("general.file_type")


def read_header(path: Path) -> Header:
    """The header of a file that reaches to its last tensor; raises :class:`GgufError` and OSError."""
    with path.open("rb") as file:
        _check_magic(file.read(len(_MAGIC)))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, len(data)).header()


def parse_header(beginning: bytes, size_bytes: int) -> Header:
    """The header of a file of ``size_bytes``, from its beginning.

    Raises :class:`GgufError` as :func:`read_header`, and :class:`HeaderCut` if it needs more of the file.
    """
    _check_magic(beginning[: len(_MAGIC)])
    return _Reader(beginning, size_bytes).header()


def _check_magic(magic: bytes) -> None:
    if not magic:
        raise GgufError("it is empty")
    if magic != _MAGIC:
        raise GgufError(f"it is not a GGUF file (it begins with {magic!r})")


class _Reader:
    """Walks the header once, front to back."""

    def __init__(self, data: mmap.mmap | bytes, size_bytes: int) -> None:
        self._data = data
        self._size_bytes = size_bytes
        self._position = len(_MAGIC)

    def header(self) -> Header:
        version = self._integer("I")
        if version not in _VERSIONS:
            raise GgufError(f"it has GGUF version {version}; versions 2 and 3 can be read")
        tensor_count, entries = self._integer("Q"), self._integer("Q")
        values: dict[str, Value] = {}
        for _ in range(entries):
            key, kind = self._string(), self._integer("I")
            values[key] = self._array() if kind == _ARRAY else Value(kind, self._value(kind))
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

    def _value(self, kind: int) -> int | float | str:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        raise GgufError(f"its header is damaged (value of type {kind})")

    def _array(self) -> Value:
        kind, count = self._integer("I"), self._integer("Q")
        items: tuple[int | float, ...] = ()
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}" if count <= _MOST_ITEMS_KEPT else None
            start = self._position
            self._skip(struct.calcsize(_SCALARS[kind]) * count)
            if code is not None:
                items = struct.unpack(code, self._read(start))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._integer("Q"))
        else:
            raise GgufError(f"its header is damaged (array of type {kind})")
        return Value(_ARRAY, None, items)

    def _string(self) -> str:
        length = self._integer("Q")
        start = self._position
        self._skip(length)
        return self._read(start).decode("utf-8", errors="replace")

    def _integer(self, code: str) -> int:
        return int(self._scalar(code))

    def _scalar(self, code: str) -> int | float:
        start = self._position
        self._skip(struct.calcsize(code))
        value: int | float = struct.unpack(f"<{code}", self._read(start))[0]
        return value

    def _read(self, start: int) -> bytes:
        """What was skipped since ``start``."""
        if self._position > len(self._data):
            raise HeaderCut
        return self._data[start : self._position]

    def _skip(self, size_bytes: int) -> None:
        self._position += size_bytes
        if self._position > self._size_bytes:
            raise GgufError(f"it ends early, after {self._size_bytes} bytes; fetch it again")
