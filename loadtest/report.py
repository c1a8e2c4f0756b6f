"""What a bench leaves behind: all that is known of it, as data."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loadtest.gate import Comparison, Verdict
from loadtest.knee import MOST_FAILURES
from loadtest.measures import Summary, Totals
from loadtest.options import BenchOptions
from loadtest.records import RequestRecord
from loadtest.scenario import Sweep
from loadtest.stages import Stage
from loadtest.watch import ClientHealth, WatchSample
from serving import __version__
from serving.cost.comparison import CostReport

# Of report.json; a reader refuses another.
VERSION = 2
_PER_REQUEST = (
    "number", "worker", "user", "tenant", "turn", "stage", "measured", "warmup", "started_at", "sent_at",
    "first_token_at", "ended_at", "wanted_prompt_tokens", "prompt_tokens", "cached_tokens",
    "completion_tokens", "finish_reason", "error", "error_message",
)  # fmt: skip
_DERIVED = ("ttft_seconds", "tpot_seconds", "end_to_end_seconds", "queue_seconds")
CSV_COLUMNS = (*_PER_REQUEST, *_DERIVED)


@dataclass(frozen=True, slots=True)
class StageReport:
    """One stage: what was measured of it, of each tenant if there are several, and of the client."""

    stage: Stage
    summary: Summary
    tenants: Mapping[str, Summary]
    client: ClientHealth

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            **self.stage.as_json(),
            "label": self.stage.label,
            "window": self.stage.window,
            "summary": asdict(self.summary),
            "tenants": {name: asdict(summary) for name, summary in self.tenants.items()},
            "client": asdict(self.client),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All that is known of a bench.

    ``totals`` are of all requests of the load, measured or not; ``totals_with_warmup`` of the first requests,
    too. ``knee`` is a load, None if none was found or sought; ``cost`` is None when there was nothing to
    price; ``comparison`` without a baseline.
    """

    options: BenchOptions
    model: str
    started: datetime
    host: dict[str, Any]
    notes: tuple[str, ...]
    records: tuple[RequestRecord, ...]
    samples: tuple[WatchSample, ...]
    stages: tuple[StageReport, ...]
    knee: float | None
    totals: Totals
    totals_with_warmup: Totals
    cost: CostReport | None
    verdicts: tuple[Verdict, ...] = ()
    comparison: Comparison | None = None

    @property
    def headline(self) -> StageReport:
        """The stage that stands for all: the knee's, or else the last."""
        at_knee = [one for one in self.stages if one.stage.load == self.knee]
        return at_knee[-1] if at_knee else self.stages[-1]

    @property
    def beyond_knee(self) -> str:
        """What more load than the knee's brings, as words that follow that."""
        worse = [one.summary.totals for one in self.stages if one.stage.load > (self.knee or 0.0)]
        if any(totals.errors > MOST_FAILURES * totals.requests for totals in worse):
            return f"makes more than {MOST_FAILURES:.0%} of the requests fail"
        load = self.options.scenario.load
        assert isinstance(load, Sweep)
        return f"brings less than {1 / load.knee_share - 1:.0%} more throughput, and longer waits"

    @property
    def settings(self) -> dict[str, Any]:
        """What it takes to run it again; the API key is left out."""
        options = self.options
        return {
            "url": options.url,
            "model": self.model,
            "scenario": options.scenario_name,
            "seed": options.seed,
            "workers": options.workers,
            "remote_workers": options.remote_workers,
            "web": options.web,
            "slo": options.slo,
            "baseline": None if options.baseline is None else options.baseline.name,
            "cost": options.cost.model_dump(mode="json"),
        }

    @property
    def to_repeat(self) -> dict[str, Any]:
        """All that is needed to run it again, and where it ran; ``scenario`` is a scenario's file, as JSON."""
        scenario = self.options.scenario.model_dump(mode="json", exclude_defaults=True)
        return {"settings": self.settings, "scenario": scenario, "client_host": self.host}

    @property
    def passed(self) -> bool:
        """Whether all conditions hold."""
        return all(verdict.passed for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """``report.json``. The chunks' moments are in records.jsonl alone."""
        return {
            "version": VERSION,
            "started": self.started.isoformat(),
            "model": self.model,
            "settings": self.settings,
            "scenario": self.options.scenario.model_dump(mode="json"),
            "client_host": self.host,
            "notes": list(self.notes),
            "stages": [one.as_json() for one in self.stages],
            "headline": self.headline.stage.index,
            "knee": self.knee,
            "totals": asdict(self.totals),
            "totals_with_warmup": asdict(self.totals_with_warmup),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "comparison": None if self.comparison is None else asdict(self.comparison),
            "cost": asdict(self.cost) if self.cost else None,
            "client": [asdict(sample) for sample in self.samples],
            "requests": [
                {name: getattr(record, name) for name in CSV_COLUMNS} for record in self.records
            ],
        }


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
