"""Rules, as Prometheus' own tool reads and runs them, and what the runbook has of each alert."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import run

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
HERE = Path(__file__).parent


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_prometheus_and_alertmanager_take_their_files() -> None:
    # The key's file is made where it is deployed.
    run("promtool", "check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    checked = run(
        "promtool", "check", "rules", PROMETHEUS / "recording.yml", PROMETHEUS / "alerts.yml"
    )
    assert checked.count("SUCCESS") == 2
    run("amtool", "check-config", ROOT / "docker" / "alertmanager" / "alertmanager.yml")


@pytest.mark.parametrize("file", ["recording.yml", "alerts.yml"])
def test_rules_over_series_with_known_answers(file: str) -> None:
    run("promtool", "test", "rules", HERE / file)


def test_all_rules_are_tested() -> None:
    cases = yaml.safe_load((HERE / "alerts.yml").read_text())["tests"]
    tested = " ".join(each["expr"] for case in cases for each in case["promql_expr_test"])
    for rule in rules("alerts.yml"):
        severity = rule["labels"]["severity"]
        named = re.findall(rf'alertname="{rule["alert"]}"[^}}]*', tested)
        # One that is raised in two severities is tested in both.
        assert any(f'severity="{severity}"' in each for each in named) or (
            named and not any("severity" in each for each in named)
        ), rule["alert"]
    cases = yaml.safe_load((HERE / "recording.yml").read_text())["tests"]
    tested = " ".join(each["expr"] for case in cases for each in case["promql_expr_test"])
    # The windows of an objective are named together.
    tested = re.sub(r"_slow:ratio_rate\(5m\|30m\|1h\|6h\)", "_slow", tested)
    for rule in rules("recording.yml"):
        assert re.sub(r"_slow:ratio_rate\w+", "_slow", rule["record"]) in tested


def test_alerts_that_are_raised_twice_tell_their_severities_apart() -> None:
    seen = [(rule["alert"], rule["labels"]["severity"]) for rule in rules("alerts.yml")]
    assert len(set(seen)) == len(seen)
    assert {severity for _, severity in seen} == {"page", "ticket"}


def test_each_alert_has_its_place_in_the_runbook() -> None:
    runbook = (ROOT / "docs" / "runbook.md").read_text()
    headings = re.findall(r"(?m)^## (\w+)$", runbook)
    assert set(headings) == {rule["alert"] for rule in rules("alerts.yml")}
    for rule in rules("alerts.yml"):
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
    for text in re.split(r"(?m)^## \w+$", runbook)[1:]:
        assert len(text.split()) >= 20
