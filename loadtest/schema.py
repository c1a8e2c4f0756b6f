"""The JSON Schema of report.json: ``python -m loadtest.schema`` writes docs/report.schema.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from loadtest.gate import Comparison, Verdict
from loadtest.measures import Summary, Totals
from loadtest.report import VERSION
from loadtest.scenario import Scenario
from loadtest.watch import ClientHealth, WatchSample
from serving.config import CostConfig
from serving.cost.comparison import CostReport

PATH = Path(__file__).parent.parent / "docs" / "report.schema.json"


class _Closed(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]


class StageDocument(_Closed):
    """A stage: what it was, what was measured of it, and whether the client kept up."""

    index: int
    begin: float
    end: float
    users: int | None
    requests_per_second: float | None
    arrivals: str
    burstiness: float
    warm_up: float
    cool_down: float
    label: str
    window: tuple[float, float]
    summary: Summary
    tenants: dict[str, Summary]
    client: ClientHealth


class RequestDocument(_Closed):
    """A request, as in records.jsonl, without its chunks; moments are seconds since the bench began."""

    number: int
    worker: int
    user: int
    tenant: str
    turn: int
    stage: int
    measured: bool
    warmup: bool
    started_at: float
    sent_at: float
    first_token_at: float | None
    ended_at: float
    wanted_prompt_tokens: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    error: str | None
    error_message: str | None
    ttft_seconds: float | None
    tpot_seconds: float | None
    end_to_end_seconds: float
    queue_seconds: float


class SettingsDocument(_Closed):
    """What it takes to run it again, beside the scenario; ``cost`` is the config's section."""

    url: str
    model: str
    scenario: str
    seed: int
    workers: int
    remote_workers: int
    web: bool
    slo: list[str]
    baseline: str | None
    cost: CostConfig


class ReportDocument(_Closed):
    """report.json. Latencies are in seconds, intervals (low, high) of 95 %, an end of null is open.

    ``cost`` is that of docs/cost-model.md, in USD, null where nothing could be priced.
    """

    version: Literal[2]
    started: str
    model: str
    settings: SettingsDocument
    scenario: Scenario
    client_host: dict[str, Any]
    notes: list[str]
    stages: list[StageDocument]
    headline: int
    knee: float | None
    totals: Totals
    totals_with_warmup: Totals
    verdicts: list[Verdict]
    comparison: Comparison | None
    cost: CostReport | None
    client: list[WatchSample]
    requests: list[RequestDocument]


def report_schema() -> dict[str, Any]:
    """The schema."""
    schema = TypeAdapter(ReportDocument).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    assert VERSION == 2, "the schema above is of another version"
    PATH.write_text(json.dumps(report_schema(), indent=1) + "\n", encoding="utf-8")
