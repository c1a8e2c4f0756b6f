"""Rules and dashboards on a real Prometheus that scrapes a rig under load, and one with cards."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serving.metrics import Metrics
from tests.monitoring.live import (
    DEPLOYED,
    MODEL,
    LoadedRig,
    Prometheus,
    as_asked,
    metrics_in,
    scraped_cards,
)
from tests.processes import wait_for
from tools import dashboards

LOAD_SECONDS = 12.0
# What only a remote with a budget, a route that passes requests on, a key that is refused or HTTPS shows.
NEEDS_OTHER_RIGS = {
    "rigserve_breaker_state",
    "rigserve_api_spent_usd",
    "rigserve_api_budget_usd",
    "rigserve_route_passed_on_total",
    "rigserve_tls_certificate_expiry_timestamp_seconds",
}


@pytest.fixture(scope="module")
def cards() -> Iterator[str]:
    with scraped_cards() as target:
        yield target


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[LoadedRig]:
    with LoadedRig(tmp_path_factory.mktemp("rig"), cache_dir) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def prometheus(
    tmp_path_factory: pytest.TempPathFactory, rig: LoadedRig, cards: str
) -> Iterator[Prometheus]:
    """After some seconds of load."""
    targets = [rig.target, cards]
    with Prometheus(tmp_path_factory.mktemp("prometheus"), targets, rig.keys["prometheus"]) as it:
        it.wait_until_ready()
        rig.put_under_load(LOAD_SECONDS)
        wait_for(lambda: not it.failing_rules(), "all rules were evaluated")
        # Twice the interval: what the last rules see is recorded.
        time.sleep(3)
        yield it


def here(prometheus: Prometheus, rig: LoadedRig, record: str) -> float:
    instance = rig.target
    return prometheus.value(f'{record}{{instance="{instance}", model="{MODEL}"}}')


def test_rules_tell_what_the_rig_did(prometheus: Prometheus, rig: LoadedRig) -> None:
    assert prometheus.value(f'up{{instance="{rig.target}"}}') == 1
    generated = here(prometheus, rig, "instance_model:rigserve_completion_tokens:rate5m")
    ledger_tokens = here(prometheus, rig, "rigserve_completion_tokens_total")
    # Rates see all but the first scrape's share, and reach beyond both ends of the samples.
    assert 0.5 * ledger_tokens < generated * 300 < 2 * ledger_tokens
    ttft = here(prometheus, rig, "instance_model:rigserve_time_to_first_token_seconds:p50_rate5m")
    p99 = here(prometheus, rig, "instance_model:rigserve_time_to_first_token_seconds:p99_rate5m")
    assert 0.01 <= ttft <= p99 < 80
    cost = here(prometheus, rig, "instance_model:rigserve_usd_per_million_tokens:rate1h")
    total_usd = prometheus.value("sum(rigserve_cost_usd_total)")
    total_tokens = prometheus.value(
        "sum(rigserve_prompt_tokens_total) + sum(rigserve_completion_tokens_total)"
    )
    assert cost == pytest.approx(1e6 * total_usd / total_tokens, rel=0.5)
    assert here(prometheus, rig, "instance_model:rigserve_joules_per_completion_token:rate1h") > 0
    savings = prometheus.query("instance_model_compared:rigserve_saving:ratio_rate1h")
    assert {dict(labels)["compared_to"] for labels in savings} == set(
        rig.config["cost"]["compare_to"]
    )
    assert here(prometheus, rig, "instance_model:rigserve_request_errors:ratio_rate5m") > 0
    assert prometheus.value('max(instance_gpu:rigserve_gpu_memory_used:ratio{gpu="0"})') == (
        pytest.approx(20 / 24)
    )


def test_all_that_rules_and_dashboards_name_exists(prometheus: Prometheus) -> None:
    groups = [
        group
        for name in ("recording.yml", "alerts.yml")
        for group in yaml.safe_load((DEPLOYED / name).read_text())["groups"]
    ]
    expressions = [rule["expr"] for group in groups for rule in group["rules"]]
    expressions += [query.expression for query in queries()]
    named = set().union(*map(metrics_in, expressions))
    assert len(named) > 60
    missing = named - prometheus.names()
    # Some need what this rig has not; they exist all the same.
    assert missing <= NEEDS_OTHER_RIGS
    defined = Metrics().exposition().decode()
    for name in missing:
        assert f"# TYPE {name} " in defined


def queries() -> list[dashboards.Query]:
    return [
        query for board in dashboards.BOARDS for panel in board.panels for query in panel.queries
    ]


@pytest.mark.parametrize("board", [board.name for board in dashboards.BOARDS])
def test_panels_have_something_to_show(prometheus: Prometheus, board: str) -> None:
    [panels] = [each.panels for each in dashboards.BOARDS if each.name == board]
    empty = [
        panel.title
        for panel in panels
        for query in panel.queries
        if not prometheus.query(as_asked(query.expression))
        and not metrics_in(query.expression) & NEEDS_OTHER_RIGS
    ]
    assert not empty


def test_the_alerts_of_this_rig_are_those_it_gives_reason_for(prometheus: Prometheus) -> None:
    alerts = {dict(labels)["alertname"] for labels in prometheus.query("ALERTS")}
    # Refused by a full queue for 12 s, which is too short to be told; a spent budget is told at once.
    assert {"KeyBudgetUsedUp", "RequestsRefused"} <= alerts
    assert not alerts & {"RigserveDown", "EngineDown", "ConfigNotTakenUp", "GpuHot", "GpuLost"}


@pytest.mark.parametrize("name", sorted(dashboards.texts()))
def test_dashboards_are_as_their_module_makes_them(name: str) -> None:
    text = dashboards.texts()[name]
    assert (dashboards.FOLDER / name).read_text() == text, "run: python -m tools.dashboards"
    board = json.loads(text)
    # Panels lie side by side within Grafana's 24 columns, and none over another.
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not own & cells, panel["title"]
        cells |= own
