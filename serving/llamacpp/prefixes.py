"""Prefixes in main memory: the cells of tokens whose slot was given to others, or soon may be."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.llamacpp.runtime import LoraAdapter

_COMPARED_AT_ONCE = 64


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


class PrefixStore:
    """Prefixes of slots, in main memory; the least recently used is dropped first."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[int, Saved] = OrderedDict()
        self.used_bytes = 0

    def refresh(self, tokens: list[int], adapter: LoraAdapter | None) -> bool:
        """Whether there is an entry that begins with all of ``tokens``; it counts as just used then."""
        best = self.longest(tokens, adapter)
        return best is not None and common_prefix(best.tokens, tokens) == len(tokens)

    def put(self, saved: Saved) -> bool:
        """Keep a prefix, in place of those it begins with; False if it alone would be too much."""
        if len(saved.cells) > self.capacity_bytes:
            return False
        for old in list(self._entries.values()):
            if (
                old.adapter == saved.adapter
                and saved.tokens[: len(old.tokens)] == old.tokens
            ):  # fmt: skip
                self.remove(old)
        self._entries[id(saved)] = saved
        self.used_bytes += len(saved.cells)
        while self.used_bytes > self.capacity_bytes:
            self.remove(next(iter(self._entries.values())))
        return True

    def remove(self, saved: Saved) -> None:
        """Forget a prefix, if it is still there."""
        if self._entries.pop(id(saved), None) is not None:
            self.used_bytes -= len(saved.cells)

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
