"""A search for a terminal: a line as it goes on, and what it has come to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from serving.tuning.bench import MOST_OF_OTHERS, Work
from serving.tuning.goal import Failed, Measured
from serving.tuning.outcome import Outcome, changes_of, quality_of
from serving.tuning.search import Candidate, Phase, Trial

_PHASES: Mapping[Phase, str] = MappingProxyType(
    {"explore": "trying", "halve": "longer", "compare": "comparing"}
)
_MOST_FAILURES = 5


class Shown:
    """Progress as a bar of the budget on a terminal; elsewhere a line for each trial, on stderr."""

    def __init__(self, budget_seconds: float) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        columns = (
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=budget_seconds)
        self._count = 0
        self._best = 0.0

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, phase: Phase, default: Candidate, candidate: Candidate, spent: float) -> None:
        """A trial begins."""
        self._count += 1
        best = f", best {self._best:,.0f} tok/s" if self._best else ""
        text = f"{self._count} {_PHASES[phase]}: {words_of(default, candidate)}"
        self._bar.update(self._task, completed=spent, description=text + best)
        if not self._is_terminal:
            print(text, file=sys.stderr, flush=True)

    def again(self) -> None:
        """It is measured once more."""
        text = "other programs were busy meanwhile: once more"
        self._bar.update(self._task, description=text)
        if not self._is_terminal:
            print(f"  {text}", file=sys.stderr, flush=True)

    def end(self, trial: Trial) -> None:
        """It has ended."""
        result = trial.result
        if isinstance(result, Measured):
            self._best = max(self._best, result.tokens_per_second)
            text = f"{result.tokens_per_second:,.0f} tok/s"
        else:
            text = f"failed: {result.reason}"
        if not self._is_terminal:
            print(f"  {text}, {trial.seconds:.0f} s", file=sys.stderr, flush=True)


def words_of(default: Candidate, candidate: Candidate) -> str:
    """How a candidate differs from the default."""
    if candidate.is_default:
        return "the default"
    changes = [f"{key} {_value(now)}" for key, _, now in changes_of(default.model, candidate.model)]
    return ", ".join(changes) or "the default's settings"


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if hasattr(value, "method"):
        return str(value.method)
    if isinstance(value, bool):
        return "on" if value else "off"
    return "unset" if value is None else str(value)


def render(outcome: Outcome, work: Work) -> RenderableType:
    """The default beside the best of the others, and which to take."""
    return Group(
        Text.assemble(
            (outcome.default.model.name, "bold"),
            f": {_count_of(outcome)} settings tried with {work.users} users, "
            f"{work.prompt_tokens} prompt tokens and {work.output_tokens} generated",
        ),
        *_tables(outcome),
        Text(outcome.reason, style="bold"),
        *_disturbances(outcome),
        *_failures(outcome),
    )


def _count_of(outcome: Outcome) -> int:
    return len({(trial.candidate.space, trial.candidate.point) for trial in outcome.trials})


def _tables(outcome: Outcome) -> list[RenderableType]:
    shown = outcome.best
    if outcome.comparison is not None:
        shown = outcome.comparison.contender
    if shown is None:
        return []
    settings = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("setting", "default", "best of the others"):
        settings.add_column(heading)
    for key, before, now in changes_of(outcome.default.model, shown.model):
        settings.add_row(key, _value(before), _value(now))
    settings.add_row("quality", quality_of(outcome.default.model), quality_of(shown.model))
    figures = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    figures.add_column("")
    for heading in ("default", "best of the others", "ratio (95 %)"):
        figures.add_column(heading, justify="right")
    ours, theirs = outcome.figures_of(outcome.default), outcome.figures_of(shown)
    for name, label, scale, digits in (
        ("tokens_per_second", "tok/s, all users", 1.0, 0),
        ("ttft_p50_seconds", "TTFT p50, ms", 1e3, 0),
        ("ttft_p95_seconds", "TTFT p95, ms", 1e3, 0),
        ("tpot_p50_seconds", "TPOT p50, ms", 1e3, 1),
        ("tpot_p95_seconds", "TPOT p95, ms", 1e3, 1),
        ("usd_per_million", "$/M tokens", 1.0, 3),
    ):
        cells = [
            "" if each is None else f"{getattr(each, name) * scale:,.{digits}f}"
            for each in (ours, theirs)
        ]
        figures.add_row(label, *cells, _ratio(outcome, name))
    pairs = len(outcome.comparison.pairs) if outcome.comparison else 0
    note = f"Medians of {pairs} measurements of each, in turns." if pairs else "Measured once."
    source = (theirs or ours).energy_source if theirs or ours else ""  # type: ignore[union-attr]
    return [settings, figures, Text(f"{note} $: energy {source}.", style="dim"), Text()]


def _ratio(outcome: Outcome, name: str) -> str:
    if outcome.comparison is None:
        return ""
    ratio = outcome.comparison.ratio(lambda each: float(getattr(each, name)))
    return f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""


def _disturbances(outcome: Outcome) -> list[RenderableType]:
    if not outcome.disturbed:
        return []
    return [
        Text(
            f"{outcome.disturbed} of {len(outcome.trials)} measurements were made beside other programs that took more than "
            f"{MOST_OF_OTHERS:.0%} of the processors; end those, and run it again with --fresh.",
            style="yellow",
        )
    ]


def _failures(outcome: Outcome) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for trial in outcome.failed[:_MOST_FAILURES]:
        assert isinstance(trial.result, Failed)
        words = words_of(outcome.default, trial.candidate)
        lines.append(Text(f"failed: {words}: {trial.result.reason}", style="dim"))
    if len(outcome.failed) > _MOST_FAILURES:
        lines.append(Text(f"and {len(outcome.failed) - _MOST_FAILURES} more", style="dim"))
    return lines


def to_json(outcome: Outcome, work: Work) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "model": outcome.default.model.name,
        "objective": outcome.goal.objective,
        "users": work.users,
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        "interrupted": outcome.was_interrupted,
        "reason": outcome.reason,
        "best": outcome.best and outcome.best.model.model_dump(mode="json", exclude_defaults=True),
        "best_is_default": outcome.best is not None and outcome.best.is_default,
        "ratio": outcome.comparison
        and outcome.comparison.ratio(lambda each: each.tokens_per_second),
        "trials": [
            {
                "phase": trial.phase,
                "rounds": trial.rounds,
                "seconds": round(trial.seconds, 3),
                "engine": trial.candidate.model.engine,
                "changes": words_of(outcome.default, trial.candidate),
                "is_default": trial.candidate.is_default,
                **(
                    {"failed": trial.result.reason}
                    if isinstance(trial.result, Failed)
                    else {"measured": trial.result.as_json()}
                ),
            }
            for trial in outcome.trials
        ],
    }
