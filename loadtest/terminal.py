"""What a bench shows in the terminal: progress while it runs, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from loadtest.measures import Distribution
from loadtest.records import RequestRecord
from loadtest.report import Report
from serving.cost.render import render

_PLAIN_INTERVAL_SECONDS = 5.0


def show_progress(
    console: Console,
    records: Sequence[RequestRecord],
    users: int,
    remaining: Callable[[], float | None],
) -> None:
    """A line on what has happened so far, until no time remains."""
    begun = last_plain = time.monotonic()
    with console.status("starting") as status:
        while (left := remaining()) is not None:
            now = time.monotonic()
            done = [record for record in records if not record.warmup]
            tokens = sum(record.completion_tokens or 0 for record in done)
            failed = sum(record.error is not None for record in done)
            line = (
                f"{now - begun:.0f} s, {users} users: {len(done)} requests, {failed} errors, "
                f"{tokens / max(now - begun, 1e-9):.0f} tokens/s"
            )
            status.update(line)
            if not console.is_terminal and now - last_plain >= _PLAIN_INTERVAL_SECONDS:
                last_plain = now
                console.print(line)
            time.sleep(min(0.2, left))


def show_report(console: Console, report: Report, out: Path) -> None:
    """The summary, the cost of the tokens, and where the rest is."""
    summary, totals = report.summary, report.summary.totals
    console.print(
        f"\n[bold]{report.model}[/bold] at {report.options.url}: {report.options.users} users, "
        f"{summary.window_seconds:.1f} s"
    )
    console.print(
        f"{totals.requests} requests, {totals.errors} errors, {summary.requests_per_second:.2f} requests/s"
    )
    console.print(
        f"tokens/s: {_rate(summary.prompt_tokens_per_second)} in, "
        f"{_rate(summary.completion_tokens_per_second)} out "
        f"({_rate(summary.completion_tokens_per_second_per_user)} a user)"
    )
    for kind, count in summary.error_classes.items():
        console.print(f"[red]{count} x {kind}[/red]; the first: {summary.first_error}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds")
    for heading in ("mean", "p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    for name, distribution in latency_rows(report):
        table.add_row(name, *_milliseconds(distribution))
    console.print(table)
    for note in report.notes:
        console.print(f"Note: {note}")
    if report.cost is not None:
        console.print(render(report.cost))
    else:
        console.print("No cost: no request succeeded, or the server does not count tokens.")
    console.print(f"\nReport: {out / 'report.html'} (also report.json, report.csv)")


def latency_rows(report: Report) -> list[tuple[str, Distribution | None]]:
    """The four latencies, named in full."""
    summary = report.summary
    return [
        ("TTFT, time to first token", summary.ttft_seconds),
        ("ITL, inter-token latency", summary.itl_seconds),
        ("TPOT, time per output token", summary.tpot_seconds),
        ("end to end", summary.end_to_end_seconds),
    ]


def _milliseconds(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-"] * 4
    values = (distribution.mean, distribution.p50, distribution.p90, distribution.p99)
    return [f"{value * 1e3:,.1f}" for value in values]


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f}"
