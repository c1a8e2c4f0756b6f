"""What the scheduler counts about itself, for metrics and for the benchmark's profile."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Part = Literal["build", "decode", "sample", "emit"]

# Bounds of a histogram, as Prometheus writes them: powers of two, as far as batches are useful.
_ROWS = (*(str(2**power) for power in range(12)), "+Inf")


def rows_up_to(rows: int) -> str:
    """The bound of the bucket that counts steps of so many rows: the next power of two."""
    return _ROWS[min((rows - 1).bit_length(), len(_ROWS) - 1)]


def _no_steps() -> dict[str, int]:
    return dict.fromkeys(_ROWS, 0)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is now: sequences that wait and that hold slots, and memory in use."""

    waiting: int
    waiting_by_class: Mapping[str, int]
    running: int
    kv_used_tokens: int
    kv_total_tokens: int
    prefix_store_bytes: int


class Stopwatch:
    """A context manager, written out because a step takes several."""

    __slots__ = ("_part", "_seconds", "_started")

    def __init__(self, seconds: dict[Part, float], part: Part) -> None:
        self._seconds = seconds
        self._part = part

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._part] += time.perf_counter() - self._started


@dataclass(slots=True)
class Stats:
    """Totals since the start. ``step_seconds`` splits the time of the scheduler's steps.

    Steps are counted by :func:`rows_up_to`. A row is a token: a prompt's, the last one of a running
    sequence, or a draft.
    """

    step_seconds: dict[Part, float] = field(
        default_factory=lambda: {"build": 0.0, "decode": 0.0, "sample": 0.0, "emit": 0.0}
    )
    prefill_steps: dict[str, int] = field(default_factory=_no_steps)
    prefill_tokens: int = 0
    decode_steps: dict[str, int] = field(default_factory=_no_steps)
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def time(self, part: Part) -> Stopwatch:
        """Adds the time of a ``with`` block to a part of the step."""
        return Stopwatch(self.step_seconds, part)

    def to_json(self) -> dict[str, Any]:
        """All totals."""
        return asdict(self)
