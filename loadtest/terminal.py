"""What a bench shows in the terminal: progress while it runs, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadtest.crowd import Collector
from loadtest.markdown import (
    LATENCIES,
    goodput,
    interval,
    notes,
    number,
    pair,
    verdict_line,
)
from loadtest.report import Report
from loadtest.stages import Stage
from serving.cost.render import render

_PLAIN_INTERVAL_SECONDS = 5.0
_REDRAW_SECONDS = 0.5
_BLOCKS = "▁▂▃▄▅▆▇█"
_HISTORY = 40


def sparkline(values: Sequence[float]) -> str:
    """Values as a row of blocks, the greatest one full."""
    top = max(values, default=0)
    if not top:
        return _BLOCKS[0] * len(values)
    return "".join(_BLOCKS[min(int(v / top * len(_BLOCKS)), len(_BLOCKS) - 1)] for v in values)


class Progress:
    """A live view of a terminal, or a line now and then of anything else."""

    def __init__(self, console: Console, collector: Collector, clock: Callable[[], float]) -> None:
        self._console = console
        self._collector = collector
        self._clock = clock
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._last = time.monotonic()
        self._seen = 0
        self._tokens: list[tuple[float, float]] = []
        self._ttfts: list[tuple[float, float]] = []
        self._errors = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, stage: Stage, doing: str) -> None:
        """Draw anew, unless that was just done."""
        now = time.monotonic()
        wait = _REDRAW_SECONDS if self._console.is_terminal else _PLAIN_INTERVAL_SECONDS
        if now - self._last < wait:
            return
        self._last = now
        self._read_on()
        if self._console.is_terminal:
            self._live.update(self._view(stage, doing), refresh=True)
        else:
            self._console.print(self._line(stage, doing))

    def _read_on(self) -> None:
        """Take in the records that are new."""
        records = self._collector.records
        for record in records[self._seen :]:
            self._errors += record.error is not None
            if record.ttft_seconds is not None:
                self._ttfts.append((record.ended_at, record.ttft_seconds))
            self._tokens.append((record.ended_at, float(record.completion_tokens or 0)))
        self._seen = len(records)

    def _line(self, stage: Stage, doing: str) -> str:
        left = stage.end - self._clock()
        state = doing if doing == "finishing" else f"{max(left, 0.0):.0f} s left"
        if stage.end == float("inf"):
            state = "until Ctrl-C"
        return (
            f"{stage.label}, {state}: {self._seen} requests, {self._errors} errors, "
            f"{self._collector.in_flight} in flight, {self._per_second(stage):.0f} tokens/s"
        )

    def _per_second(self, stage: Stage) -> float:
        since = max(self._clock() - stage.begin, 1e-9)
        return sum(tokens for at, tokens in self._tokens if at >= stage.begin) / since

    def _view(self, stage: Stage, doing: str) -> Group:
        now = self._clock()
        done = min(max((now - stage.begin) / max(stage.end - stage.begin, 1e-9), 0.0), 1.0)
        head = Text.assemble((f"stage {stage.index + 1}: ", "bold"), self._line(stage, doing))
        parts: list[Text | ProgressBar] = [head, ProgressBar(total=1.0, completed=done, width=60)]
        for name, series, how in (
            ("tokens/s", self._tokens, "sum"),
            ("TTFT ms", self._ttfts, "median"),
        ):
            values = _by_second(series, now, how)
            if values:
                scale = 1e3 if how == "median" else 1.0
                parts.append(
                    Text.assemble(
                        (f"{name:>9} ", "dim"),
                        (sparkline(values), "cyan"),
                        f" {values[-1] * scale:,.0f} (most: {max(values) * scale:,.0f})",
                    )
                )
        return Group(*parts)


def _by_second(series: Sequence[tuple[float, float]], now: float, how: str) -> list[float]:
    """The last seconds of a series: sums, or medians, of what fell in each."""
    last = int(now)
    bins: list[list[float]] = [[] for _ in range(_HISTORY)]
    for at, value in series:
        place = int(at) - last + _HISTORY
        if 0 <= place < _HISTORY:
            bins[place].append(value)
    if how == "sum":
        values = [sum(one) for one in bins]
    else:
        values = [float(np.median(one)) if one else 0.0 for one in bins]
    first = next((n for n, value in enumerate(values) if value), len(values))
    return values[first:]


def show_report(console: Console, report: Report, out: Path) -> None:
    """The stages, the latencies, the verdicts, the cost of the tokens, and where the rest is."""
    totals, head = report.totals, report.headline
    # As Text: servers' own words may hold brackets, which rich would take for its markup.
    rest = (
        f" at {report.options.url}, scenario {report.options.scenario_name}: "
        f"{totals.requests} requests, {totals.errors} errors"
    )
    console.print(Text.assemble("\n", (report.model, "bold"), rest))
    console.print(_stages_table(report))
    if report.knee is not None:
        console.print(f"The knee (*) is at {head.stage.label}: more load {report.beyond_knee}.")
    for kind, count in head.summary.error_classes.items():
        told = f"; the first: {head.summary.first_error}"
        console.print(Text.assemble((f"{count} x {kind}", "red"), told))
    console.print(f"At {head.stage.label}:")
    console.print(_latency_table(report))
    for verdict in report.verdicts:
        style = "green" if verdict.passed else "bold red"
        line = verdict_line(verdict.passed, verdict.subject, verdict.reason)
        console.print(Text(line, style=style))
    for note in notes(report):
        console.print(Text(f"Note: {note}"))
    if report.cost is not None:
        console.print(render(report.cost))
    else:
        console.print("No cost: no request succeeded, or the server does not count tokens.")
    console.print(
        f"\nReport: {out / 'report.html'} (also report.json, report.csv, report.md, records.jsonl)"
    )


def _stages_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("load", no_wrap=True)
    for heading in ("req/s", "tok/s", "a user", "TTFT ms", "ITL ms", "failed", "SLO"):
        sub = "\np50 / p95" if heading.endswith("ms") else ""
        table.add_column(heading + sub, justify="right", no_wrap=True)
    for one in report.stages:
        summary = one.summary
        knee = " *" if report.knee is not None and one is report.headline else ""
        doubt = " !" if one.client.limits else ""
        table.add_row(
            one.stage.label + knee + doubt,
            f"{summary.requests_per_second:.2f}",
            number(summary.completion_tokens_per_second),
            number(summary.completion_tokens_per_second_per_user),
            pair(summary.ttft_seconds),
            pair(summary.itl_seconds),
            f"{summary.totals.errors}/{summary.totals.requests}",
            goodput(summary),
        )
    return table


def _latency_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("milliseconds", no_wrap=True)
    for heading in ("mean", "p50", "p95", "p99", "p95 in (95 %)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, key in LATENCIES:
        found = getattr(report.headline.summary, key)
        if found is not None:
            shown = (f"{getattr(found, part) * 1e3:,.1f}" for part in ("mean", "p50", "p95", "p99"))
            table.add_row(name.partition(",")[0], *shown, interval(found, "p95"))
    return table
