"""Finds the load beyond which a server gets slower, but hardly does more."""

from __future__ import annotations

import math

from loadtest.scenario import Sweep

# Less than this from twice the load, twice in succession (once may be noise), and it is saturated.
_LEAST_GAIN = 1.05
_FRUITLESS = 2
_MOST_FAILURES = 0.1
_CLOSE_ENOUGH = 1.3


class KneeSearch:
    """Doubles the load until it brings nothing more, then halves the gap in which the knee lies.

    The knee is the least load whose throughput is at least ``knee_share`` of the greatest seen: a definition
    that a person can check on the curve, and that noise moves little.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._throughputs: dict[float, float] = {}
        self._fruitless = 0
        self.saturated = False

    def saw(self, load: float, throughput: float, failed_share: float) -> None:
        """Take in what a stage showed. Throughput is of anything, but always of the same."""
        if not self.saturated:
            gained = throughput >= max(self._throughputs.values(), default=0.0) * _LEAST_GAIN
            self._fruitless = 0 if gained else self._fruitless + 1
            # Beyond the greatest load that may be tried there is no second.
            enough = 1 if load >= self._sweep.most else _FRUITLESS
            self.saturated = failed_share > _MOST_FAILURES or self._fruitless >= enough
        self._throughputs[load] = throughput

    @property
    def knee(self) -> float | None:
        """None while no more load has been shown to bring nothing more."""
        return self._least_enough() if self.saturated else None

    def next_load(self) -> float | None:
        """What to try next; None when the knee is known well enough, or may not be sought further."""
        if len(self._throughputs) >= self._sweep.max_stages:
            return None
        if not self._throughputs:
            return self._sweep.start
        if not self.saturated:
            highest = max(self._throughputs)
            doubled = min(highest * 2, self._sweep.most)
            return doubled if doubled > highest else None
        knee = self._least_enough()
        below = max((load for load in self._throughputs if load < knee), default=None)
        if below is None:
            return None
        middle = math.sqrt(knee * below)
        if self._sweep.over == "users":
            middle = float(round(middle))
        if knee / below <= _CLOSE_ENOUGH or middle in self._throughputs:
            return None
        return middle

    def _least_enough(self) -> float:
        enough = self._sweep.knee_share * max(self._throughputs.values())
        return min(load for load, value in self._throughputs.items() if value >= enough)
