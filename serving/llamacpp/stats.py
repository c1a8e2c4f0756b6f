"""What the scheduler counts about itself, for metrics and for the benchmark's profile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Part = Literal["build", "decode", "sample", "emit"]


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is now: sequences that wait and that hold slots, and memory in use."""

    waiting: int
    waiting_by_class: Mapping[str, int]
    running: int
    kv_used_tokens: int
    kv_total_tokens: int
    prefix_store_bytes: int


@dataclass(slots=True)
class Stats:
    """Totals since the start. ``step_seconds`` splits the time of the scheduler's steps."""

    step_seconds: dict[Part, float] = field(
        default_factory=lambda: {"build": 0.0, "decode": 0.0, "sample": 0.0, "emit": 0.0}
    )
    steps: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    decode_steps: int = 0
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @contextmanager
    def time(self, part: Part) -> Iterator[None]:
        """Add the time of the block to a part of the step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.step_seconds[part] += time.perf_counter() - started

    def to_json(self) -> dict[str, Any]:
        """All totals."""
        return asdict(self)
