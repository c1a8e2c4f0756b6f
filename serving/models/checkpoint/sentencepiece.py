"""Reads ``tokenizer.model``, the vocabulary of a SentencePiece tokenizer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serving.models.checkpoint.config import UnfitCheckpoint

# Field numbers and values of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3
_MODEL_TYPE, _BPE = 3, 2
_ADD_DUMMY_PREFIX = 3
_NORMAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """``kind`` is numbered as GGUF's token types are."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The pieces by their ids, and whether a space is put before a text."""

    pieces: tuple[Piece, ...]
    adds_space_prefix: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Raises :class:`UnfitCheckpoint` unless it is a BPE model; and OSError."""
    try:
        return _model(path.read_bytes())
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise UnfitCheckpoint(f"its {path.name} is damaged ({error}); fetch it again") from error


def _model(data: bytes) -> SentencePieceModel:
    pieces, kind, adds_space_prefix = [], 1, True
    for number, value in _fields(data):
        if number == _PIECES and isinstance(value, bytes):
            fields = dict(_fields(value))
            text, score = fields[_TEXT], fields.get(_SCORE, b"\0\0\0\0")
            assert isinstance(text, bytes)
            assert isinstance(score, bytes)
            piece_kind = fields.get(_KIND, _NORMAL)
            assert isinstance(piece_kind, int)
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], piece_kind))
        elif number == _TRAINER and isinstance(value, bytes):
            kind = int(dict(_fields(value)).get(_MODEL_TYPE, kind))
        elif number == _NORMALIZER and isinstance(value, bytes):
            adds_space_prefix = bool(dict(_fields(value)).get(_ADD_DUMMY_PREFIX, True))
    if kind != _BPE:
        raise UnfitCheckpoint("its tokenizer.model is not of type BPE, which GGUF needs here")
    return SentencePieceModel(tuple(pieces), adds_space_prefix)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffers message: numbers, and values as varints or bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == _VARINT:
            value, position = _varint(data, position)
        else:
            if wire == _BYTES:
                size, position = _varint(data, position)
            else:
                size = {_FIXED64: 8, _FIXED32: 4}[wire]
            value = data[position : position + size]
            if len(value) < size:
                raise ValueError("it ends early")
            position += size
        yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
