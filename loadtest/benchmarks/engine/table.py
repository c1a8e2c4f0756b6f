"""Results as Markdown."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def heading(threads: int) -> str:
    """The date, the machine and the command of a run."""
    return (
        f"\n## {date.today()}: {_processor()}, {threads} threads\n\n"
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"llama-cpp-python {version('llama-cpp-python')}. "
        "Servers measured in turns, the others stopped meanwhile; medians of rounds, ratios of medians.\n\n"
        f"Command: `python -m loadtest.benchmarks.engine {shlex.join(sys.argv[1:])}`\n"
    )


def section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str) -> str:
    """A titled table with a note below."""
    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"\n### {title}\n\n{table}\n\n{note}\n"


def ratio(ours: float, theirs: float) -> str:
    """Ours over theirs."""
    return f"**{ours / theirs:.2f}**"


def milliseconds(seconds: float) -> str:
    """For a person to read."""
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"


def percentile(values: Sequence[float], percent: int) -> float:
    """By linear interpolation; the value itself when there is one only."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _processor() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in (_CPUINFO.read_text().splitlines() if _CPUINFO.exists() else ())
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or "unknown processor"
