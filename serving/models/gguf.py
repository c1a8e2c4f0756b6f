"""Reads a GGUF file's header: enough to know its type, and to find a file that was cut short."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

# ``enum gguf_type`` of gguf.h, as codes of the struct module; the file is little-endian.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class GgufError(Exception):
    """A file is no whole GGUF file; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Header:
    """``file_type`` is ``general.file_type``, a value of ``enum llama_ftype``; None if the file has none."""

    file_type: int | None


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
        tensors, entries = self._integer("Q"), self._integer("Q")
        numbers: dict[bytes, int] = {}
        for _ in range(entries):
            key, value = self._string(), self._value(self._integer("I"))
            if value is not None:
                numbers[key] = value
        last_offset = 0
        for _ in range(tensors):
            self._string()
            self._skip(8 * self._integer("I") + 4)  # dimensions, type
            last_offset = max(last_offset, self._integer("Q"))
        if tensors:
            alignment = numbers.get(b"general.alignment") or _DEFAULT_ALIGNMENT
            self._skip(-self._position % alignment + last_offset + 1)
        return Header(numbers.get(b"general.file_type"))

    def _value(self, kind: int) -> int | None:
        """Pass over a value; integers are returned."""
        if kind in _SCALARS:
            value = self._scalar(_SCALARS[kind])
            return value if isinstance(value, int) else None
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            item_kind, count = self._integer("I"), self._integer("Q")
            if item_kind in _SCALARS:
                self._skip(struct.calcsize(_SCALARS[item_kind]) * count)
            elif item_kind == _STRING:
                for _ in range(count):
                    self._skip(self._integer("Q"))
            else:
                raise GgufError(f"its header is damaged (array of type {item_kind})")
        else:
            raise GgufError(f"its header is damaged (value of type {kind})")
        return None

    def _string(self) -> bytes:
        length = self._integer("Q")
        start = self._position
        self._skip(length)
        return self._data[start : self._position]

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
