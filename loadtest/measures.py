"""Every figure of a bench, computed from its records in this one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadtest.records import RequestRecord
from loadtest.scenario import Slo
from loadtest.stages import Stage
from loadtest.statistics import (
    BATCHES,
    Array,
    Distribution,
    Interval,
    batch_interval,
    distribution,
    weighted_distribution,
)

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over requests. Tokens are None as soon as one success came without usage."""

    requests: int
    errors: int
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Rate:
    """Something per second, and the 95 % interval of it."""

    per_second: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that kept all limits of the SLO: per second, and as a share of all that were due."""

    requests_per_second: float
    share: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What is measured of one stage, or of one tenant in it.

    Rates are over the window: tokens count when they arrive in it, whichever request they belong to, a
    request when it ends in it, its prompt tokens when its first token comes. A user's rate is a request's:
    its tokens over its whole time. Latencies, errors and goodput are of the requests that were due in the
    window, however long they took; distributions are of those that succeeded. None where there is nothing
    to measure.
    """

    window_seconds: float
    users: int
    totals: Totals
    error_classes: dict[str, int]
    first_error: str | None
    requests_per_second: float
    requests_interval: Interval
    prompt_tokens_per_second: float | None
    completion_tokens_per_second: float | None
    completion_tokens_interval: Interval
    completion_tokens_per_second_per_user: float | None
    cached_share: float | None
    goodput: Goodput | None
    ttft_seconds: Distribution | None
    itl_seconds: Distribution | None
    tpot_seconds: Distribution | None
    end_to_end_seconds: Distribution | None
    normalized_seconds: Distribution | None
    queue_seconds: Distribution | None


def marked(records: Iterable[RequestRecord], stages: Sequence[Stage]) -> list[RequestRecord]:
    """The records in their order, each with its stage and whether it is measured."""
    by_index = {stage.index: stage for stage in stages}
    result = []
    for record in sorted(records, key=lambda record: record.number):
        low, high = by_index[record.stage].window if record.stage in by_index else (0.0, 0.0)
        inside = not record.warmup and low <= record.started_at < high
        result.append(replace(record, measured=inside))
    return result


def summarize(records: Sequence[RequestRecord], window: Window, slo: Slo) -> Summary:
    """All figures of a stage. ``records`` may be of others, too: what they began may still run in its window."""
    low, high = window
    seconds = max(high - low, 1e-9)
    measured = [record for record in records if record.measured and low <= record.started_at < high]
    good = [record for record in measured if record.error is None]
    failed = [record for record in measured if record.error]
    totals = totals_of(measured)
    succeeded = [record for record in records if record.error is None and not record.warmup]
    ends = [record.ended_at for record in succeeded if low <= record.ended_at < high]
    request_rate = _rate(np.array(ends), np.ones(len(ends)), window)
    moments, tokens = _arrivals(succeeded)
    token_rate = _rate(moments, tokens, window)
    unknown = any(record.completion_tokens is None for record in succeeded)
    prompts = [
        record.prompt_tokens or 0
        for record in succeeded
        if record.first_token_at is not None and low <= record.first_token_at < high
    ]
    cached, prompt = totals.cached_tokens, totals.prompt_tokens
    return Summary(
        window_seconds=seconds,
        users=len({record.user for record in measured}),
        totals=totals,
        error_classes=dict(Counter(record.error for record in failed if record.error)),
        first_error=failed[0].error_message if failed else None,
        requests_per_second=request_rate.per_second,
        requests_interval=request_rate.interval,
        prompt_tokens_per_second=None if unknown else sum(prompts) / seconds,
        completion_tokens_per_second=None if unknown else token_rate.per_second,
        completion_tokens_interval=(None, None) if unknown else token_rate.interval,
        completion_tokens_per_second_per_user=_mean(
            record.completion_tokens / record.end_to_end_seconds
            for record in good
            if record.completion_tokens is not None and record.end_to_end_seconds > 0
        ),
        cached_share=cached / prompt if cached is not None and prompt else None,
        goodput=_goodput(measured, slo, seconds),
        ttft_seconds=distribution(record.ttft_seconds for record in good),
        itl_seconds=weighted_distribution([inter_token(record) for record in good]),
        tpot_seconds=distribution(record.tpot_seconds for record in good),
        end_to_end_seconds=distribution(record.end_to_end_seconds for record in good),
        normalized_seconds=distribution(record.normalized_seconds for record in good),
        queue_seconds=distribution(record.queue_seconds for record in good),
    )


def by_tenant(records: Sequence[RequestRecord], window: Window, slo: Slo) -> dict[str, Summary]:
    """A summary of each tenant; of one alone, none, as it would say the same again."""
    tenants = sorted({record.tenant for record in records if not record.warmup})
    if len(tenants) < 2:
        return {}
    return {
        tenant: summarize([record for record in records if record.tenant == tenant], window, slo)
        for tenant in tenants
    }


def inter_token(record: RequestRecord) -> tuple[Array, Array]:
    """The inter-token latencies of a request and how many tokens each of them stands for.

    The gap before a chunk of several tokens is shared among them.
    """
    gaps = np.array(record.chunk_gaps_seconds, dtype=float)
    if record.chunk_tokens is None:
        return gaps, np.ones(len(gaps))
    tokens = np.array(record.chunk_tokens[1:], dtype=float)
    return gaps / tokens, tokens


def keeps(record: RequestRecord, slo: Slo) -> bool:
    """Whether an answer came, and within all limits."""
    limits = (
        (record.ttft_seconds, slo.ttft_ms),
        (record.tpot_seconds or 0.0, slo.tpot_ms),
        (record.end_to_end_seconds, slo.end_to_end_ms),
    )
    return record.error is None and all(
        limit is None or (seconds is not None and seconds * 1e3 <= limit)
        for seconds, limit in limits
    )


def _goodput(measured: Sequence[RequestRecord], slo: Slo, seconds: float) -> Goodput | None:
    if not measured or slo == Slo():
        return None
    kept = sum(keeps(record, slo) for record in measured)
    return Goodput(kept / seconds, kept / len(measured))


def _arrivals(records: Sequence[RequestRecord]) -> tuple[Array, Array]:
    """When tokens came: (moments, tokens)."""
    moments: list[Array] = []
    tokens: list[Array] = []
    for record in records:
        if record.first_token_at is None:
            continue
        at = record.first_token_at + np.cumsum([0.0, *record.chunk_gaps_seconds])
        moments.append(at)
        tokens.append(
            np.ones(len(at)) if record.chunk_tokens is None else np.array(record.chunk_tokens)
        )
    if not moments:
        return np.array([]), np.array([])
    return np.concatenate(moments), np.concatenate(tokens)


def _rate(moments: Array, amounts: Array, window: Window) -> Rate:
    low, high = window
    seconds = max(high - low, 1e-9)
    inside = (moments >= low) & (moments < high)
    sums, _ = np.histogram(
        moments[inside], BATCHES, (low, max(high, low + 1e-9)), weights=amounts[inside]
    )
    rates = [float(total) / (seconds / BATCHES) for total in sums]
    return Rate(float(amounts[inside].sum()) / seconds, batch_interval(rates))


def totals_of(records: Sequence[RequestRecord]) -> Totals:
    """Sums over records."""
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


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def tokens_over_time(
    records: Sequence[RequestRecord], begin: float, end: float, bins: int
) -> list[tuple[float, float]]:
    """Generated tokens per second in each of ``bins`` equal slices: (middle in seconds, rate)."""
    moments, tokens = _arrivals([record for record in records if not record.warmup])
    sums, edges = np.histogram(moments, bins, (begin, max(end, begin + 1e-9)), weights=tokens)
    width = (end - begin) / bins or 1e-9
    return [
        (float(edge) + width / 2, float(total) / width)
        for edge, total in zip(edges, sums, strict=False)
    ]
