"""Guesses which settings are good from those that were measured: Bayesian regression, sampled (Thompson, 1933).

Each value of each key multiplies what the base gives by some factor, whatever the other keys are: nearly true, and
cheap to learn, since every measurement tells of all keys. What it is not true of, the rounds after it find out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serving.tuning.space import Point, Space

# Standard deviations of logarithms: of a measurement, of the base, and of what values are thought to do beforehand.
_NOISE, _OF_BASE, _OF_VALUES = 0.08, 0.2, 0.15
# How often each value of the first key is proposed at first: what other programs do to one measurement is not its fault.
_TIMES_FIRST = 2


class Explorer:
    """Learns the points of one space; ``rng`` makes its guesses, so that the same one makes the same."""

    def __init__(self, space: Space, rng: np.random.Generator) -> None:
        self._space, self._rng = space, rng
        self._starts = [1]
        for size in space.sizes:
            self._starts.append(self._starts[-1] + size - 1)
        count = self._starts[-1]
        self._expected = np.zeros(count)
        for start, (key, values) in zip(self._starts, space.values.items(), strict=False):
            for number, value in enumerate(values[1:]):
                self._expected[start + number] = space.expected.get((key, value), 0.0)
        precision = np.full(count, _OF_VALUES**-2)
        precision[0] = _OF_BASE**-2
        self._precision: NDArray[np.float64] = np.diag(precision)
        self._weighted = precision * self._expected
        self._zero: float | None = None
        # Numbers of values, key by key, that are still to be proposed.
        self._open = [deque(range(1, size)) for size in space.sizes]
        self._open[0] *= _TIMES_FIRST

    def learn(self, point: Point, score: float) -> None:
        """A measurement's score, a logarithm; the first is what others are compared with."""
        if self._zero is None:
            self._zero = score
        row = self._row(point)
        self._precision += np.outer(row, row) / _NOISE**2
        self._weighted += row * (score - self._zero) / _NOISE**2

    @property
    def knows_base(self) -> bool:
        """Whether anything was measured."""
        return self._zero is not None

    def guess(self) -> tuple[Point, float]:
        """A point, and its score, were the effects as they may well be.

        At first the likeliest with two values that are new, one of the first key, which matters most, and one of the
        others in turns: each is seen, whatever was expected of it. Then the best by a sample of the effects.
        """
        covariance = np.linalg.inv(self._precision)
        effects = self._rng.multivariate_normal(self._mean(), covariance)
        point = self._with_new_values(self.best()) if any(self._open) else self._best_of(effects)
        return point, (self._zero or 0.0) + float(self._row(point) @ effects)

    def _with_new_values(self, point: Point) -> Point:
        changed = list(point)
        if self._open[0]:
            changed[0] = self._open[0].popleft()
        # Keys with as many values left as others come first in their order.
        fullest = max(range(len(self._open)), key=lambda key: (key > 0) * len(self._open[key]))
        if self._open[fullest]:
            changed[fullest] = self._open[fullest].popleft()
        return tuple(changed)

    def best(self) -> Point:
        """The best point by what is likeliest."""
        return self._best_of(self._mean())

    def _mean(self) -> NDArray[np.float64]:
        return np.asarray(np.linalg.solve(self._precision, self._weighted), np.float64)

    def _best_of(self, effects: NDArray[np.float64]) -> Point:
        return tuple(
            int(np.argmax([0.0, *effects[start : start + size - 1]]))
            for start, size in zip(self._starts, self._space.sizes, strict=False)
        )

    def _row(self, point: Sequence[int]) -> NDArray[np.float64]:
        row = np.zeros(len(self._expected))
        row[0] = 1.0
        for start, number in zip(self._starts, point, strict=False):
            if number:
                row[start + number - 1] = 1.0
        return row
