"""The report as Markdown: the tables, for an issue or a results page."""

from __future__ import annotations

import json

from loadtest.measures import Summary
from loadtest.report import Report
from loadtest.statistics import Distribution

LATENCIES = (
    ("TTFT, time to first token", "ttft_seconds"),
    ("ITL, inter-token latency", "itl_seconds"),
    ("TPOT, time per output token", "tpot_seconds"),
    ("end to end", "end_to_end_seconds"),
    ("normalized, end to end per token", "normalized_seconds"),
    ("queueing", "queue_seconds"),
)


def render_markdown(report: Report) -> str:
    """The whole text."""
    head = report.headline
    lines = [
        f"# {report.model}: load",
        "",
        f"{report.started:%Y-%m-%d %H:%M %Z}, scenario `{report.options.scenario_name}`, {report.options.url}. "
        f"{report.totals.requests} requests, {report.totals.errors} failed.",
        "",
        *(
            f"- {verdict_line(passed, subject, reason)}"
            for passed, subject, reason in verdicts(report)
        ),
        *(f"- Note: {note}" for note in notes(report)),
        "",
        "| load | requests/s | tokens/s | TTFT p50 / p95 (ms) | ITL p50 / p95 (ms) | failed | goodput | client |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in report.stages:
        summary = one.summary
        knee = " (knee)" if report.knee is not None and one is head else ""
        lines.append(
            f"| {one.stage.label}{knee} | {summary.requests_per_second:.2f} | "
            f"{number(summary.completion_tokens_per_second)} | {pair(summary.ttft_seconds)} | "
            f"{pair(summary.itl_seconds)} | {summary.totals.errors} of {summary.totals.requests} | "
            f"{goodput(summary)} | {'; '.join(one.client.limits) or 'ok'} |"
        )
    lines += [
        "",
        f"At {head.stage.label}, milliseconds, with 95 % intervals:",
        "",
        "| | mean | p50 | p90 | p95 | p99 | values |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, key in LATENCIES:
        found: Distribution | None = getattr(head.summary, key)
        if found is not None:
            cells = (with_interval(found, part) for part in ("mean", "p50", "p90", "p95", "p99"))
            lines.append(f"| {name} | {' | '.join(cells)} | {found.count} |")
    settings = json.dumps(report.to_repeat, indent=1)
    return "\n".join((*lines, "", "```json", settings, "```", ""))


def notes(report: Report) -> list[str]:
    """What a reader must know before believing the figures."""
    told = list(report.notes)
    for one in report.stages:
        told += [
            f"At {one.stage.label} the client was the limit: {why}." for why in one.client.limits
        ]
        if not one.summary.totals.requests:
            told.append(
                f"At {one.stage.label} nothing was measured: the stage is too short for it."
            )
    return told


def verdicts(report: Report) -> list[tuple[bool, str, str]]:
    """Of the gate: (passed, subject, reason)."""
    return [(one.passed, one.subject, one.reason) for one in report.verdicts]


def verdict_line(passed: bool, subject: str, reason: str) -> str:
    """One of them as a line."""
    return f"{'pass' if passed else 'FAIL'}: {subject}: {reason}"


def with_interval(found: Distribution, part: str) -> str:
    """A statistic in milliseconds and its interval; an end that so few values leave open is ``?``."""
    return f"{getattr(found, part) * 1e3:,.1f} ({interval(found, part)})"


def interval(found: Distribution, part: str) -> str:
    """Its two ends in milliseconds."""
    ends = found.intervals[part]
    return " to ".join("?" if end is None else f"{end * 1e3:,.1f}" for end in ends)


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or that it is unknown."""
    return "unknown" if value is None else f"{value:,.{digits}f}"


def pair(found: Distribution | None) -> str:
    """Median and 95th percentile in milliseconds."""
    return "-" if found is None else f"{_milliseconds(found.p50)} / {_milliseconds(found.p95)}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{0 if seconds >= 1 else 1}f}"


def goodput(summary: Summary) -> str:
    """The share of requests that kept the SLO, if there is one."""
    return "-" if summary.goodput is None else f"{summary.goodput.share:.0%}"
