"""Figures of several servers, and their ratios, as Markdown."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

# One measurement: by what it is, with its unit.
Figures = Mapping[str, float]
_CPUINFO = Path("/proc/cpuinfo")


class Results:
    """The figures of all rounds. The first of ``names`` is ours; ratios are ours over another's."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, figures: Figures) -> None:
        """Take in what a round has found about the named server."""
        for what, value in figures.items():
            self._values[what][name].append(value)

    def median(self, what: str, name: str) -> float:
        """Of what the rounds have found about the named server."""
        return statistics.median(self._values[what][name])

    def markdown(self, title: str, wanted: Mapping[str, str], note: str) -> str:
        """A table of medians. ``wanted`` says, by the end of a figure's name, what is aimed at."""
        others = self._names[1:]
        columns = ["", *self._names, *(f"÷ {name}" for name in others), "wanted"]
        lines = [columns, ["---"] * len(columns)]
        for what, values in self._values.items():
            medians = {name: statistics.median(each) for name, each in values.items()}
            ours = medians.get(self._names[0])
            ratios = [
                f"**{ours / medians[name]:.2f}**" if ours is not None and medians.get(name) else ""
                for name in others
            ]
            cells = [_short(medians[name]) if name in medians else "" for name in self._names]
            aim = next((aim for end, aim in wanted.items() if what.endswith(end)), "")
            lines.append([what, *cells, *ratios, aim])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"\n#### {title}\n\n{table}\n\n{note}\n"


def heading(threads: int) -> str:
    """The date, the machine and the command of a run."""
    return (
        f"\n## {date.today()}: {processor()}, {threads} threads\n\n"
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"llama-cpp-python {version('llama-cpp-python')}. Servers are measured in turns, the others stopped "
        "meanwhile; medians of rounds; ÷: rigserve's median over the other's.\n\n"
        f"Command: `python -m loadtest.benchmarks.engine {shlex.join(sys.argv[1:])}`\n"
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation; of at least two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def processor() -> str:
    """How many of which this machine has."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
