"""Percentiles, and how far they can be trusted. All intervals are of 95 % confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float | None, float | None]

PERCENTILES = (50, 90, 95, 99)
_Z = 1.959964
_Z_99 = 2.575829
BATCHES = 10
_EXACT_BELOW = 1000


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values in seconds, percentiles linear between neighbours.

    ``intervals`` holds (low, high) for ``mean`` and each percentile; an end is None where so few values
    say nothing about it.
    """

    count: int
    mean: float
    minimum: float
    p50: float
    p90: float
    p95: float
    p99: float
    maximum: float
    intervals: dict[str, Interval]


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Of the values that are not None; None if none are left.

    The percentiles' intervals are order statistics: no shape is assumed (David and Nagaraja, Order
    Statistics, 7.1); the mean's is Student's.
    """
    known = np.sort(np.array([value for value in values if value is not None], dtype=float))
    if not len(known):
        return None
    mean = float(known.mean())
    intervals: dict[str, Interval] = {"mean": (None, None)}
    if len(known) > 1:
        margin = student_t(len(known) - 1) * float(known.std(ddof=1)) / math.sqrt(len(known))
        intervals["mean"] = (mean - margin, mean + margin)
    for percent in PERCENTILES:
        low, high = order_statistics(len(known), percent / 100)
        intervals[f"p{percent}"] = (
            None if low is None else float(known[low]),
            None if high is None else float(known[high]),
        )
    p50, p90, p95, p99 = (float(value) for value in np.percentile(known, PERCENTILES))
    return Distribution(
        len(known), mean, float(known[0]), p50, p90, p95, p99, float(known[-1]), intervals
    )


def student_t(freedom: int, confidence: float = 0.95) -> float:
    """What such a share of Student's t with so many degrees of freedom lies within, to a hundredth of it.

    From three on by the normal's quantile (Abramowitz and Stegun, 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi / 2 * confidence)
    if freedom == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))


def order_statistics(count: int, quantile: float) -> tuple[int | None, int | None]:
    """Positions in ``count`` sorted values between which the quantile lies; None: beyond the end."""
    if count < _EXACT_BELOW:
        below = _binomial_cdf(count, quantile)
        # P(quantile < value[i]) = P(at most i values lie below it) = below[i]
        low = int(np.searchsorted(below, 0.025, side="right")) - 1
        high = int(np.searchsorted(below, 0.975, side="left"))
        high += 0 if high < count and below[high] >= 0.975 else 1
    else:
        spread = _Z * math.sqrt(count * quantile * (1 - quantile))
        low, high = math.floor(count * quantile - spread) - 1, math.ceil(count * quantile + spread)
    return (low if low >= 0 else None), (high if high < count else None)


def _binomial_cdf(count: int, probability: float) -> Array:
    hits = np.arange(count + 1)
    log_factorials = np.array([math.lgamma(n + 1) for n in range(count + 1)])
    chosen = log_factorials[count] - log_factorials[hits] - log_factorials[count - hits]
    logs = chosen + hits * math.log(probability) + (count - hits) * math.log1p(-probability)
    result: Array = np.cumsum(np.exp(logs))
    return result


def weighted_distribution(groups: Sequence[tuple[Array, Array]]) -> Distribution | None:
    """Of values with weights, in groups whose values belong together: (values, weights) each.

    Equal weights give the plain percentiles. Values of one group are no independent witnesses: what the
    groups differ by says how many independent values they are worth all together (the effective sample size;
    Korn and Graubard, Survey Methodology 24, 1998), and the intervals are those of so many.
    """
    groups = [group for group in groups if len(group[0])]
    if not groups:
        return None
    values = np.concatenate([group[0] for group in groups])
    weights = np.concatenate([group[1] for group in groups])
    owners: NDArray[np.int64] = np.repeat(
        np.arange(len(groups)), [len(group[0]) for group in groups]
    )
    order = np.argsort(values)
    ordered, ordered_weights = values[order], weights[order]
    middles = np.cumsum(ordered_weights) - ordered_weights / 2

    def quantiles(shares: Array) -> Array:
        places = middles[0] + shares * (middles[-1] - middles[0])
        found: Array = np.interp(places, middles, ordered)
        return found

    mean = float(np.average(values, weights=weights))
    intervals: dict[str, Interval] = {"mean": (None, None)}
    error = _standard_error(values - mean, weights, owners)
    if error is not None:
        margin = student_t(len(groups) - 1) * error
        intervals["mean"] = (mean - margin, mean + margin)
    shares = np.array(PERCENTILES) / 100
    percentiles = quantiles(shares)
    for percent, share, value in zip(PERCENTILES, shares, percentiles, strict=True):
        below = (values <= value).astype(float)
        error = _standard_error(below - np.average(below, weights=weights), weights, owners)
        worth = 1
        if error is not None:
            spread = (error * student_t(len(groups) - 1) / _Z) ** 2
            worth = int(min(share * (1 - share) / spread, len(values)) if spread else len(values))
        worth = max(worth, 1)
        low, high = (
            None if place is None else float(quantiles(np.array(place / max(worth - 1, 1))))
            for place in order_statistics(worth, float(share))
        )
        intervals[f"p{percent}"] = (low, high)
    p50, p90, p95, p99 = map(float, percentiles)
    return Distribution(
        count=len(values),
        mean=mean,
        minimum=float(ordered[0]),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
        maximum=float(ordered[-1]),
        intervals=intervals,
    )


def _standard_error(residuals: Array, weights: Array, owners: NDArray[np.int64]) -> float | None:
    """Of a weighted mean, from its values less it, by the sums of groups (Cochran, Sampling Techniques, 9A.2)."""
    sums = np.bincount(owners, residuals * weights)
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * float(np.sum(sums**2))) / float(weights.sum())


def batch_interval(rates: Sequence[float]) -> Interval:
    """Of a mean rate, from the rates of :data:`BATCHES` equal stretches of time, one after the other.

    Batch means (Law and Kelton, Simulation Modeling and Analysis, 9.5.3): neighbours in time are alike,
    stretches are much less so.
    """
    if len(rates) != BATCHES:
        return None, None
    mean = float(np.mean(rates))
    margin = student_t(BATCHES - 1) * float(np.std(rates, ddof=1)) / math.sqrt(BATCHES)
    return max(mean - margin, 0.0), mean + margin


def compared(
    before: Sequence[Any], now: Sequence[Any], statistic: Any, draws: int = 1000
) -> tuple[float, float, float] | None:
    """The ratio of a statistic now to before, and its 99 % interval; None where it cannot be told.

    ``before`` and ``now`` are batches, each an array of values of one stretch of time; the interval is a
    bootstrap over batches, so that what happens for a while does not count as many independent events,
    widened as Student's t is for so few (Efron and Tibshirani, chapter 13.7, say why it must be).
    """
    if len(before) < 2 or len(now) < 2:
        return None
    rng = np.random.default_rng(0)

    def drawn(batches: Sequence[Any]) -> Array:
        picks = rng.integers(len(batches), size=(draws, len(batches)))
        return np.array([statistic(np.concatenate([batches[i] for i in pick])) for pick in picks])

    base = statistic(np.concatenate(before))
    if not base:
        return None
    earlier = drawn(before)
    if not np.all(earlier > 0):
        return None
    ratio = float(statistic(np.concatenate(now)) / base)
    low, high = map(float, np.percentile(drawn(now) / earlier, (0.5, 99.5)))
    count = min(len(before), len(now))
    wider = math.sqrt(count / (count - 1)) * student_t(count - 1, 0.99) / _Z_99
    return ratio, _away(low, ratio, wider), _away(high, ratio, wider)


def _away(end: float, ratio: float, times: float) -> float:
    """An end of a ratio's interval, so many times as far from it, as logarithms."""
    return ratio * (end / ratio) ** times if end > 0 and ratio > 0 else end
