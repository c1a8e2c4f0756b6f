"""Every statistic of a bench, computed from its records in this one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loadtest.records import RequestRecord


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles (linearly interpolated) of so many values, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over requests. Tokens are None as soon as one success came without usage."""

    requests: int
    errors: int
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The measured requests, the warm-up left out.

    ``window_seconds`` runs from the first request's start to the last one's end, so it includes the time
    after the last start in which requests are finished; rates are over it. A user's rate is that of all,
    divided by ``users``: those who sent a request. Distributions are of successful requests; None where
    there is nothing to measure. The inter-token latency is the gap between chunks with text.
    """

    window_seconds: float
    users: int
    totals: Totals
    totals_with_warmup: Totals
    error_classes: dict[str, int]
    first_error: str | None
    requests_per_second: float
    prompt_tokens_per_second: float | None
    completion_tokens_per_second: float | None
    prompt_tokens_per_second_per_user: float | None
    completion_tokens_per_second_per_user: float | None
    ttft_seconds: Distribution | None
    itl_seconds: Distribution | None
    tpot_seconds: Distribution | None
    end_to_end_seconds: Distribution | None


def summarize(records: Sequence[RequestRecord]) -> Summary:
    """All figures of a bench."""
    measured = [record for record in records if not record.warmup]
    good = [record for record in measured if record.error is None]
    totals = _totals(measured)
    window = 0.0
    if measured:
        window = max(r.ended_at for r in measured) - min(r.started_at for r in measured)
    failed = [record for record in measured if record.error]
    users = len({record.user for record in measured})

    def rate(count: int | None, sharers: int = 1) -> float | None:
        return None if count is None or not window else count / window / sharers

    return Summary(
        window_seconds=window,
        users=users,
        totals=totals,
        totals_with_warmup=_totals(records),
        error_classes=dict(Counter(record.error for record in failed if record.error)),
        first_error=failed[0].error_message if failed else None,
        requests_per_second=rate(len(good)) or 0.0,
        prompt_tokens_per_second=rate(totals.prompt_tokens),
        completion_tokens_per_second=rate(totals.completion_tokens),
        prompt_tokens_per_second_per_user=rate(totals.prompt_tokens, users),
        completion_tokens_per_second_per_user=rate(totals.completion_tokens, users),
        ttft_seconds=distribution(r.ttft_seconds for r in good),
        itl_seconds=distribution(gap for r in good for gap in r.chunk_gaps_seconds),
        tpot_seconds=distribution(r.tpot_seconds for r in good),
        end_to_end_seconds=distribution(r.end_to_end_seconds for r in good),
    )


def _totals(records: Sequence[RequestRecord]) -> Totals:
    good = [record for record in records if record.error is None]
    return Totals(
        requests=len(records),
        errors=len(records) - len(good),
        prompt_tokens=_sum(record.prompt_tokens for record in good),
        cached_tokens=_sum(record.cached_tokens for record in good),
        completion_tokens=_sum(record.completion_tokens for record in good),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Mean and percentiles of the values that are not None; None if none are left."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return Distribution(
        count=len(known),
        mean=sum(known) / len(known),
        p50=percentile(known, 50),
        p90=percentile(known, 90),
        p99=percentile(known, 99),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The percentile of sorted values, linear between neighbours (NumPy's default method)."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def throughput_over_time(records: Sequence[RequestRecord], bins: int) -> list[tuple[float, float]]:
    """Generated tokens per second in each of ``bins`` equal slices of time: (middle in seconds, rate).

    A request's tokens count evenly from its first token to its end.
    """
    good = [r for r in records if r.first_token_at is not None and r.completion_tokens]
    if not good:
        return []
    begin = min(r.started_at for r in good)
    width = (max(r.ended_at for r in good) - begin) / bins
    totals = [0.0] * bins
    for record in good:
        assert record.first_token_at is not None
        assert record.completion_tokens is not None
        span = max(record.ended_at - record.first_token_at, 1e-9)
        for position in range(bins):
            low, high = begin + position * width, begin + (position + 1) * width
            overlap = min(high, record.ended_at) - max(low, record.first_token_at)
            if overlap > 0:
                totals[position] += record.completion_tokens * overlap / span
    return [(begin + (i + 0.5) * width, total / width) for i, total in enumerate(totals)]
