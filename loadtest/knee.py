"""Finds the load beyond which a server gets slower, but hardly does more."""

from __future__ import annotations

import math

from loadtest.scenario import Sweep

# Less than this from twice the load, twice in succession (once may be noise), and it is saturated.
_LEAST_GAIN = 1.05
_FRUITLESS = 2
MOST_FAILURES = 0.1
_CLOSE_ENOUGH = 1.3


class KneeSearch:
    """Doubles the load until it brings nothing more, or fails, then halves the gap in which the knee lies.

    The knee is the least load whose throughput is at least ``knee_share`` of the greatest seen: a definition
    that a person can check on the curve, and that noise moves little. What a load brings at which more than
    a tenth of the requests fail does not count.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._throughputs: dict[float, float] = {}
        self._failing: set[float] = set()
        self._fruitless = 0
        self.saturated = False

    def saw(self, load: float, throughput: float, failed_share: float) -> None:
        """Take in what a stage showed. Throughput is of anything, but always of the same."""
        if failed_share > MOST_FAILURES:
            self._failing.add(load)
            self.saturated = True
            return
        if not self.saturated:
            gained = throughput >= max(self._throughputs.values(), default=0.0) * _LEAST_GAIN
            self._fruitless = 0 if gained else self._fruitless + 1
            # Beyond the greatest load that may be tried there is no second.
            enough = 1 if load >= self._sweep.most else _FRUITLESS
            self.saturated = self._fruitless >= enough
        self._throughputs[load] = throughput

    @property
    def knee(self) -> float | None:
        """None while no more load has been shown to bring nothing more, and where all loads fail."""
        return self._least_enough() if self.saturated else None

    def next_load(self) -> float | None:
        """What to try next; None when the knee is known well enough, or may not be sought further."""
        tried = self._failing | self._throughputs.keys()
        if len(tried) >= self._sweep.max_stages:
            return None
        if not tried:
            return self._sweep.start
        if not self.saturated:
            highest = max(tried)
            doubled = min(highest * 2, self._sweep.most)
            return doubled if doubled > highest else None
        knee = self._least_enough()
        if knee is None:
            return None
        least_failing = min(self._failing, default=math.inf)
        if knee == max(self._throughputs) and knee < least_failing < math.inf:
            # The last load that went well: how much more does?
            middle = self._between(knee, least_failing)
            if middle is not None and middle not in tried:
                return middle
        below = max((load for load in tried if load < knee), default=None)
        middle = None if below is None else self._between(below, knee)
        return None if middle in tried else middle

    def _between(self, low: float, high: float) -> float | None:
        """A load halfway, None if they are close enough."""
        if high / low <= _CLOSE_ENOUGH:
            return None
        middle = math.sqrt(low * high)
        return float(round(middle)) if self._sweep.over == "users" else middle

    def _least_enough(self) -> float | None:
        enough = self._sweep.knee_share * max(self._throughputs.values(), default=0.0)
        return min(
            (load for load, value in self._throughputs.items() if value >= enough), default=None
        )
