"""Prefixes in main memory: the cells of tokens whose slot was given to others, or soon may be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.llamacpp.runtime import LoraAdapter

_COMPARED_AT_ONCE = 64
# An integer, and its place in a list.
_TOKEN_BYTES = 40


def common_prefix(left: list[int], right: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    end = min(len(left), len(right))
    for start in range(0, end, _COMPARED_AT_ONCE):
        stop = min(start + _COMPARED_AT_ONCE, end)
        if left[start:stop] != right[start:stop]:
            return next(at for at in range(start, stop) if left[at] != right[at])
    return end


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A prefix in main memory."""

    adapter: LoraAdapter | None
    tokens: list[int]
    cells: NDArray[np.uint8]

    @property
    def size_bytes(self) -> int:
        """What it takes."""
        return size_of(len(self.tokens), len(self.cells))


def size_of(tokens: int, cells_bytes: int) -> int:
    """What a prefix of so many tokens takes in main memory, in bytes."""
    return cells_bytes + tokens * _TOKEN_BYTES


class PrefixStore:
    """Prefixes of slots, in main memory; the least recently used is dropped first, ``held`` never."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[int, Saved] = OrderedDict()
        self.used_bytes = 0
        self.held: Saved | None = None

    def refresh(self, tokens: list[int], adapter: LoraAdapter | None) -> bool:
        """Whether there is an entry that begins with all of ``tokens``; it counts as just used then."""
        best = self.longest(tokens, adapter)
        return best is not None and common_prefix(best.tokens, tokens) == len(tokens)

    def make_room(self, tokens: list[int], adapter: LoraAdapter | None, size_bytes: int) -> bool:
        """Forget prefixes until one of so many bytes fits: those that it begins with, then those used least recently.

        False if it would be too much beside what is held; then nothing is forgotten.
        """
        held_bytes = self.held.size_bytes if self.held is not None else 0
        if held_bytes + size_bytes > self.capacity_bytes:
            return False
        others = [each for each in self._entries.values() if each is not self.held]
        for old in others:
            if old.adapter == adapter and tokens[: len(old.tokens)] == old.tokens:
                self.remove(old)
        for oldest in others:
            if self.used_bytes + size_bytes <= self.capacity_bytes:
                break
            self.remove(oldest)
        return True

    def put(self, saved: Saved) -> None:
        """Keep a prefix for which :meth:`make_room` has made room."""
        self._entries[id(saved)] = saved
        self.used_bytes += saved.size_bytes

    def remove(self, saved: Saved) -> None:
        """Forget a prefix, if it is still there."""
        if self._entries.pop(id(saved), None) is not None:
            self.used_bytes -= saved.size_bytes

    def longest(self, tokens: list[int], adapter: LoraAdapter | None) -> Saved | None:
        """The entry that begins most like ``tokens``."""
        best, length = None, 0
        for saved in self._entries.values():
            if saved.adapter is adapter:
                shared = common_prefix(saved.tokens, tokens)
                if shared > length:
                    best, length = saved, shared
        if best is not None:
            self._entries.move_to_end(id(best))
        return best
