"""What a bench leaves behind: report.json, report.csv and report.html."""

from __future__ import annotations

import csv
import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loadtest.html import render_html
from loadtest.measures import Summary
from loadtest.options import BenchOptions
from loadtest.records import RequestRecord
from serving import __version__
from serving.cost.comparison import CostReport

_CSV_COLUMNS = (
    "number", "user", "warmup", "started_at", "ended_at", "first_token_at", "ttft_seconds",
    "tpot_seconds", "end_to_end_seconds", "prompt_tokens", "cached_tokens", "completion_tokens",
    "finish_reason", "error", "error_message",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known of a bench. ``cost`` is None when there was nothing to price."""

    options: BenchOptions
    model: str
    started: datetime
    host: dict[str, Any]
    notes: tuple[str, ...]
    records: tuple[RequestRecord, ...]
    summary: Summary
    cost: CostReport | None

    @property
    def settings(self) -> dict[str, Any]:
        """What it takes to run it again; the API key is left out."""
        settings = asdict(self.options)
        for name in ("api_key", "cost", "out"):
            del settings[name]
        return settings | {"cost": self.options.cost.model_dump(mode="json"), "model": self.model}


def host_facts() -> dict[str, Any]:
    """The machine that sent the load, which need not be the one that served it."""
    return {
        "rigserve": __version__,
        "locust": version("locust"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_report(report: Report, out: Path) -> None:
    """Write all three files into ``out``."""
    (out / "report.json").write_text(json.dumps(_as_json(report), indent=1), encoding="utf-8")
    with (out / "report.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for record in report.records:
            writer.writerow(getattr(record, column) for column in _CSV_COLUMNS)
    (out / "report.html").write_text(
        render_html(
            summary=report.summary,
            records=report.records,
            cost=report.cost,
            model=report.model,
            started=report.started,
            settings=report.settings,
            host=report.host,
            notes=report.notes,
        ),
        encoding="utf-8",
    )


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "started": report.started.isoformat(),
        "settings": report.settings,
        "client_host": report.host,
        "notes": report.notes,
        **asdict(report.summary),
        "cost": asdict(report.cost) if report.cost else None,
        "requests": [asdict(record) for record in report.records],
    }
