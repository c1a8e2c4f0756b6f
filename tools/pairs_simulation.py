"""``python -m tools.pairs_simulation``: which comparison in turns is right how often, when some measurements are disturbed.

Simulates what `rigserve tune` does at its end: trials that scatter from start to start and from round to round, of which
some lose much to other programs. Writes Markdown to standard output.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from loadtest.statistics import student_t

Logs = NDArray[np.float64]
# The lower end of the 95 % interval of each row's ratio, as a logarithm.
Lower = Callable[[Logs], Logs]

_COMPARISONS = 20_000
_RATIOS = (1.0, 1.05, 1.1, 1.2)
# Standard deviations of logarithms, and what a disturbed trial loses.
_BETWEEN_STARTS, _BETWEEN_ROUNDS = 0.02, 0.04
_LOSSES = (0.1, 0.5)


def students(logs: Logs, aside: int = 0) -> Logs:
    """Student's t, the ``aside`` furthest out on either side counted as their neighbours (``Comparison.ratio``)."""
    pairs = logs.shape[1]
    logs = np.sort(logs, axis=1)
    kept = logs[:, aside : pairs - aside]
    clipped = np.clip(logs, kept[:, :1], kept[:, -1:])
    error = clipped.std(axis=1, ddof=1) / (kept.shape[1] / pairs * math.sqrt(pairs))
    return np.asarray(kept.mean(axis=1) - student_t(kept.shape[1] - 1) * error)


def robust(logs: Logs) -> Logs:
    """What tune does with eight pairs and more."""
    return students(logs, 1)


def signed_ranks(logs: Logs) -> Logs:
    """Wilcoxon's: an order statistic of all pairs' means (Hodges and Lehmann), exact."""
    pairs = logs.shape[1]
    first, second = np.triu_indices(pairs)
    means = np.sort((logs[:, first] + logs[:, second]) / 2, axis=1)
    ways = np.ones(1)
    for rank in range(1, pairs + 1):
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    below = np.cumsum(ways) / 2**pairs
    return np.asarray(means[:, int(np.searchsorted(below, 0.025, side="right")) - 1])


def signs(logs: Logs) -> Logs:
    """The sign test's: an order statistic of the pairs, exact."""
    pairs = logs.shape[1]
    below = np.cumsum([math.comb(pairs, count) for count in range(pairs)]) / 2**pairs
    return np.asarray(
        np.sort(logs, axis=1)[:, int(np.searchsorted(below, 0.025, side="right")) - 1]
    )


# In about equal time, where a start takes as long as a round.
_WAYS: tuple[tuple[str, int, int, Lower], ...] = (
    ("4 pairs of 4 rounds, Student's t", 4, 4, students),
    ("7 of 2, Student's t", 7, 2, students),
    ("10 of 1, Student's t", 10, 1, students),
    ("10 of 1, Wilcoxon's signed ranks (Hodges and Lehmann)", 10, 1, signed_ranks),
    ("10 of 1, signs", 10, 1, signs),
    ("**10 of 1, as tune has it**", 10, 1, robust),
)


def _trials(dice: np.random.Generator, pairs: int, rounds: int, disturbed: float) -> Logs:
    size = (_COMPARISONS, pairs)
    scatter = math.hypot(_BETWEEN_STARTS, _BETWEEN_ROUNDS / math.sqrt(rounds))
    lost = (dice.random(size) < disturbed) * dice.uniform(*_LOSSES, size)
    return np.asarray(dice.normal(0, scatter, size) - lost)


def main() -> None:
    """Print a table for each share of disturbed trials."""
    for disturbed in (0.0, 0.1):
        dice = np.random.default_rng(1)
        print(f"\n{disturbed:.0%} of the measurements disturbed:\n")
        print("| taken, if so many times as fast | " + " | ".join(f"{r:g}" for r in _RATIOS) + " |")
        print("|---|" + "--:|" * len(_RATIOS))
        for name, pairs, rounds, lower in _WAYS:
            logs = _trials(dice, pairs, rounds, disturbed) - _trials(dice, pairs, rounds, disturbed)
            shares = [float(np.mean(lower(logs + math.log(ratio)) > 0)) for ratio in _RATIOS]
            print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


if __name__ == "__main__":
    main()
