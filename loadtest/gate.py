"""What a bench must show for a CI job to pass: absolute limits, and no worse than before."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.measures import Summary
from loadtest.statistics import BATCHES, Distribution, Interval, compared

_Batches = list[list[dict[str, Any]]]
# A change of less is none, however surely it is measured.
TOLERANCE = 0.05
_Z_99 = 2.576

_LATENCIES = {
    "ttft": "ttft_seconds", "itl": "itl_seconds", "tpot": "tpot_seconds", "e2e": "end_to_end_seconds",
    "normalized": "normalized_seconds", "queue": "queue_seconds",
}  # fmt: skip
_RATES = {
    "tokens/s": ("completion_tokens_per_second", "completion_tokens_interval"),
    "requests/s": ("requests_per_second", "requests_interval"),
}
_STATISTICS = ("mean", "p50", "p90", "p95", "p99")
_UNITS = {"ms": 1e-3, "s": 1.0, "%": 1e-2, "": 1.0}
_FORM = re.compile(r"([a-z0-9/]+)\s*(mean|p\d\d)?\s*(<=|>=|<|>)\s*([\d.]+)\s*(ms|s|%)?")
_COMPARED = {"ttft_seconds": "TTFT", "tpot_seconds": "TPOT", "end_to_end_seconds": "end to end"}
_METRICS = (*_LATENCIES, *_RATES, "goodput", "errors")


class GateError(Exception):
    """A condition, or a baseline, that cannot be used."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One condition: a latency's statistic in seconds, a rate, or a share of requests."""

    text: str
    metric: str
    statistic: str | None
    comparison: str
    limit: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a condition holds; ``reason`` says what was found."""

    subject: str
    passed: bool
    reason: str


def parse_objective(text: str) -> Objective:
    """Such as ``ttft p95 < 500ms``, ``tokens/s > 100``, ``goodput >= 95%``; raises :class:`GateError`."""
    match = _FORM.fullmatch(text.strip())
    if match is None or match[1] not in _METRICS:
        raise GateError(
            f"--slo {text!r} is not of the form 'ttft p95 < 500ms', 'tokens/s > 100' or 'goodput >= 95%'; "
            f"there are {', '.join(_METRICS)}"
        )
    metric, statistic, comparison, number, unit = match.groups()
    if (metric in _LATENCIES) != (statistic in _STATISTICS):
        choice = f"one of {', '.join(_STATISTICS)}" if metric in _LATENCIES else "nothing"
        raise GateError(f"--slo {text!r}: after {metric!r} stands {choice}")
    wanted = ("ms", "s") if metric in _LATENCIES else ("", "%") if metric not in _RATES else ("",)
    if (unit or "") not in wanted:
        raise GateError(
            f"--slo {text!r}: {metric!r} is given in {' or '.join(w or 'a plain number' for w in wanted)}"
        )
    return Objective(
        text.strip(), metric, statistic, comparison, float(number) * _UNITS[unit or ""]
    )


def judge(objective: Objective, summary: Summary, label: str) -> Verdict:
    """Compare one figure of a stage with its limit. Where its interval holds the limit, that is said."""
    value, interval = _figure(objective, summary)
    subject = f"{objective.text} ({label})"
    if value is None:
        return Verdict(
            subject, False, "there is no such figure: see the notes and errors of the report"
        )
    passed = {
        "<": value < objective.limit,
        "<=": value <= objective.limit,
        ">": value > objective.limit,
        ">=": value >= objective.limit,
    }[objective.comparison]
    low, high = interval
    reason = f"it is {_shown(objective.metric, value)}"
    if (low or 0.0) <= objective.limit <= (math.inf if high is None else high):
        # An open end is one that so few values say nothing about.
        least, most = ("?" if end is None else _shown(objective.metric, end) for end in (low, high))
        reason += f", but may be anything from {least} to {most} (95 %): a longer run would tell"
    return Verdict(subject, passed, reason)


def _figure(objective: Objective, summary: Summary) -> tuple[float | None, Interval]:
    metric = objective.metric
    if metric in _LATENCIES:
        found: Distribution | None = getattr(summary, _LATENCIES[metric])
        assert objective.statistic is not None
        if found is None:
            return None, (None, None)
        return getattr(found, objective.statistic), found.intervals[objective.statistic]
    if metric in _RATES:
        name, interval = _RATES[metric]
        return getattr(summary, name), getattr(summary, interval)
    requests = summary.totals.requests
    if metric == "errors":
        if not requests:
            return None, (None, None)
        return summary.totals.errors / requests, wilson(summary.totals.errors, requests)
    if summary.goodput is None:
        return None, (None, None)
    kept = round(summary.goodput.share * requests)
    return summary.goodput.share, wilson(kept, requests)


def wilson(hits: int, count: int) -> Interval:
    """The 95 % interval of a share (E. B. Wilson, 1927)."""
    z = 1.959964
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    margin = (
        z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    )
    return max(middle - margin, 0.0), min(middle + margin, 1.0)


def _shown(metric: str, value: float) -> str:
    if metric in _LATENCIES:
        return f"{value * 1e3:,.1f} ms"
    return f"{value:,.2f}" if metric in _RATES else f"{value:.1%}"


@dataclass(frozen=True, slots=True)
class Change:
    """One figure now and in the baseline; ``ratio`` is now over before, with its 99 % interval.

    ``worse`` and ``better``: the whole interval is beyond 5 % on that side.
    """

    name: str
    before: float
    now: float
    ratio: float
    interval: tuple[float, float]
    worse: bool
    better: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """This bench beside an earlier one, stage by stage of the same load."""

    baseline: str
    started: str
    model: str
    stages: tuple[tuple[str, tuple[Change, ...]], ...]
    verdicts: tuple[Verdict, ...]


def load_baseline(path: Path, version: int) -> dict[str, Any]:
    """An earlier ``report.json``; raises :class:`GateError`."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GateError(f"--baseline {path}: {error.strerror}") from error
    except ValueError as error:
        raise GateError(f"--baseline {path} is not JSON: {error}") from error
    if not isinstance(report, dict) or report.get("version") != version:
        raise GateError(
            f"--baseline {path} is not a report.json of this version ({version}); make it again"
        )
    return report


def compare_runs(now: Mapping[str, Any], before: Mapping[str, Any], name: str) -> Comparison:
    """Both are reports as JSON. Raises :class:`GateError` if they are not of the same load, or tell too little."""
    for key in ("traffic", "slo"):
        if now["scenario"][key] != before["scenario"][key]:
            raise GateError(
                f"--baseline {name}: its scenario's {key!r} is another; only runs of the same scenario compare"
            )
    loads = [report["scenario"]["load"] for report in (now, before)]
    if "replay" in {load["kind"] for load in loads} and loads[0] != loads[1]:
        raise GateError(
            f"--baseline {name}: its scenario's 'load' is another; replays of one trace compare"
        )
    earlier = {stage["label"]: stage for stage in before["stages"]}
    shared = [stage for stage in now["stages"] if stage["label"] in earlier]
    if not shared:
        raise GateError(
            f"--baseline {name}: it has none of these loads: {', '.join(s['label'] for s in now['stages'])}"
        )
    stages, verdicts = [], []
    for stage in shared:
        other = earlier[stage["label"]]
        for key in ("arrivals", "burstiness"):
            if stage["users"] is None and stage[key] != other[key]:
                raise GateError(
                    f"--baseline {name}: at {stage['label']} its {key} was {other[key]}, not {stage[key]}"
                )
        pair = (_batches(now, stage), stage), (_batches(before, other), other)
        changes = _changes(pair[0][0], pair[1][0])
        failures = _failures(stage, other)
        if not changes and failures.passed:
            raise GateError(
                f"--baseline {name}: at {stage['label']} one of the runs has too few requests to compare; run longer"
            )
        rates = [_token_rates(batches, of) for batches, of in pair]
        if (change := _change("output tokens/s", rates, np.mean, rising=False)) is not None:
            changes.append(change)
        stages.append((stage["label"], tuple(changes)))
        verdicts += [
            Verdict(
                f"{change.name} ({stage['label']})",
                not change.worse,
                f"{change.ratio:.2f} times the baseline's (99 %: {change.interval[0]:.2f} to "
                f"{change.interval[1]:.2f})",
            )
            for change in changes
        ]
        verdicts.append(failures)
    return Comparison(
        name, str(before["started"]), str(before["model"]), tuple(stages), tuple(verdicts)
    )


def _batches(report: Mapping[str, Any], stage: Mapping[str, Any]) -> _Batches:
    """The measured successes of a stage by the tenth of its window in which they began."""
    low, high = stage["window"]
    batches: _Batches = [[] for _ in range(BATCHES)]
    for request in report["requests"]:
        if request["stage"] == stage["index"] and request["measured"] and not request["error"]:
            place = int((request["started_at"] - low) / (high - low) * BATCHES)
            batches[min(place, BATCHES - 1)].append(request)
    return batches


def _changes(now: _Batches, before: _Batches) -> list[Change]:
    changes = [
        _change(
            f"{shown} p{percent}",
            [_values(batches, key) for batches in (now, before)],
            _percentile(percent),
            rising=True,
        )
        for key, shown in _COMPARED.items()
        for percent in (50, 95)
    ]
    return [change for change in changes if change is not None]


def _change(
    name: str, values: Sequence[list[Any]], statistic: Any, *, rising: bool
) -> Change | None:
    now, before = values
    found = compared(before, now, statistic)
    if found is None:
        return None
    ratio, low, high = found
    rose, fell = low > 1 + TOLERANCE, high < 1 - TOLERANCE
    return Change(
        name=name,
        before=float(statistic(np.concatenate(before))),
        now=float(statistic(np.concatenate(now))),
        ratio=ratio,
        interval=(low, high),
        worse=rose if rising else fell,
        better=fell if rising else rose,
    )


def _percentile(percent: int) -> Any:
    return lambda values: np.percentile(values, percent)


def _values(batches: _Batches, key: str) -> list[Any]:
    found = [np.array([r[key] for r in batch if r[key] is not None]) for batch in batches]
    return [values for values in found if len(values)]


def _token_rates(batches: _Batches, stage: Mapping[str, Any]) -> list[Any]:
    """Tokens of what began in each tenth, per second."""
    low, high = stage["window"]
    seconds = (high - low) / BATCHES
    return [
        np.array([sum(r["completion_tokens"] or 0 for r in batch) / seconds]) for batch in batches
    ]


def _failures(now: Mapping[str, Any], before: Mapping[str, Any]) -> Verdict:
    """Two shares (the z test of two proportions, one-sided at 99.5 %)."""
    totals = [stage["summary"]["totals"] for stage in (now, before)]
    (failed, count), (failed_before, count_before) = (
        (total["errors"], max(total["requests"], 1)) for total in totals
    )
    share, share_before = failed / count, failed_before / count_before
    pooled = (failed + failed_before) / (count + count_before)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / count + 1 / count_before))
    worse = spread > 0 and (share - share_before) / spread > _Z_99
    return Verdict(
        f"failed requests ({now['label']})",
        not worse,
        f"{share:.1%}, in the baseline {share_before:.1%}",
    )
