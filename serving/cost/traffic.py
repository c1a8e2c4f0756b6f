"""The traffic that is priced: sums over requests, and who measured them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """A measured mix of requests.

    ``prompt_tokens`` include ``cached_tokens``, which were found in the KV cache and not computed. The busy
    seconds are the engine's time spent on prompts and on generated tokens: each step's duration, shared
    among the rows of its batch. Sources: ``engine``, ``nvml``, ``rapl``, ``estimated``, or ``mixed``.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_busy_seconds: float
    decode_busy_seconds: float
    energy_joules: float
    energy_source: str
    timing_source: str

    @property
    def busy_seconds(self) -> float:
        """Engine time in all."""
        return self.prefill_busy_seconds + self.decode_busy_seconds

    @property
    def estimated(self) -> bool:
        """Whether any of it rests on an estimate."""
        return bool({"estimated", "mixed"} & {self.energy_source, self.timing_source})
