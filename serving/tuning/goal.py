"""What is wanted of a model's settings, and how near a measurement comes to it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Objective = Literal["cheapest", "throughput", "latency"]
# A limit that is broken by a tenth weighs as much as three times fewer tokens: keeping it comes first.
_WEIGHT_OF_LIMITS = 10.0


@dataclass(frozen=True, slots=True)
class Measured:
    """What users saw of one way to serve a model.

    ``tokens_per_second`` are all users' generated tokens over the time from the first request to the last answer's
    end. ``latency_p95_seconds`` is normalized: of whole requests, per generated token. Prices are fully loaded, as
    ``energy_source`` knows the energy. ``others_share`` is what other programs took of the processors meanwhile; None
    where nobody tells.
    """

    tokens_per_second: float
    ttft_p50_seconds: float
    ttft_p95_seconds: float
    tpot_p50_seconds: float
    tpot_p95_seconds: float
    latency_p95_seconds: float
    usd_per_million: float
    energy_source: str
    requests: int
    others_share: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Failed:
    """It did not start, or did not answer: a result as others."""

    reason: str


Result = Measured | Failed


@dataclass(frozen=True, slots=True)
class Goal:
    """The objective, and limits to keep at the 95th percentile; None: any."""

    objective: Objective
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None

    def figure(self, measured: Measured) -> float:
        """What is to be large, or (prices, latencies) small."""
        match self.objective:
            case "throughput":
                return measured.tokens_per_second
            case "latency":
                return measured.latency_p95_seconds
            case "cheapest":
                return measured.usd_per_million

    @property
    def more_is_better(self) -> bool:
        """Of the figure."""
        return self.objective == "throughput"

    def gain(self, measured: Measured) -> float:
        """The logarithm of the figure, the higher the better; limits do not count."""
        return math.log(self.figure(measured)) * (1 if self.more_is_better else -1)

    def score(self, measured: Measured) -> float:
        """The gain, less what broken limits weigh: whoever keeps them is before all who do not."""
        return self.gain(measured) - _WEIGHT_OF_LIMITS * self._excess(measured)

    def is_met(self, measured: Measured) -> bool:
        """Whether all limits are kept."""
        return self._excess(measured) == 0

    def _excess(self, measured: Measured) -> float:
        seen = (
            (measured.ttft_p95_seconds, self.ttft_seconds),
            (measured.tpot_p95_seconds, self.tpot_seconds),
        )
        return sum(max(math.log(value / limit), 0.0) for value, limit in seen if limit is not None)
