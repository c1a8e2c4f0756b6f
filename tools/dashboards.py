"""Writes Grafana's dashboards: `python -m tools.dashboards`. What they show is in the tables below.

Built with Grafana's own library, whose types are its schema. A test compares the files with this module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_types
from grafana_foundation_sdk.models import dashboard as types

FOLDER = Path(__file__).parent.parent / "docker" / "grafana" / "dashboards"
_SOURCE = types.DataSourceRef(type_val="prometheus", uid="$datasource")
# Of which rigs and models; both are variables of a dashboard.
_RIG = 'instance=~"$instance"'
# Engines' series tell replicas of a model apart: chat#1, chat#2.
_MODEL = f'{_RIG}, model=~"$model(#.*)?"'


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of each of its series."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """``kind`` is ``number`` (the value now), ``bars`` (one for each series now) or ``lines`` (over time)."""

    title: str
    unit: str
    queries: Sequence[Query]
    kind: str = "lines"
    width: int = 8
    text: str = ""


@dataclass(frozen=True)
class Board:
    """A dashboard."""

    name: str
    title: str
    text: str
    panels: Sequence[Panel]
    has_models: bool = True


def _lines(
    title: str, unit: str, *queries: tuple[str, str], width: int = 8, text: str = ""
) -> Panel:
    return Panel(title, unit, [Query(*each) for each in queries], width=width, text=text)


def _number(title: str, unit: str, expression: str, text: str = "", width: int = 4) -> Panel:
    return Panel(title, unit, [Query(expression)], "number", width, text)


def _bars(title: str, unit: str, expression: str, legend: str, width: int = 8) -> Panel:
    return Panel(title, unit, [Query(expression, legend)], "bars", width)


def _percentiles(title: str, series: str) -> Panel:
    return _lines(
        title,
        "s",
        *(
            (f"instance_model:{series}:{each}_rate5m{{{_MODEL}}}", f"{{{{model}}}} {each}")
            for each in ("p50", "p95", "p99")
        ),
    )


_SPENT = f"sum(increase(rigserve_cost_usd_total{{{_MODEL}}}[$__range]))"
_SPENT_THERE = (
    f"sum by (compared_to) (increase(rigserve_commercial_cost_usd_total{{{_MODEL}}}[$__range]))"
)

BOARDS = (
    Board(
        "overview",
        "rigserve: overview",
        "What the rigs did, for whom, and what it cost here and would have cost elsewhere.",
        (
            _number(
                "Requests", "short", f"sum(increase(rigserve_requests_total{{{_MODEL}}}[$__range]))"
            ),
            _number(
                "Tokens",
                "short",
                f"sum(increase(rigserve_prompt_tokens_total{{{_MODEL}}}[$__range])) "
                f"+ sum(increase(rigserve_completion_tokens_total{{{_MODEL}}}[$__range]))",
                "Of prompts and completions.",
            ),
            _number(
                "Tenants",
                "short",
                f"count(sum by (tenant) (increase(rigserve_tenant_requests_total{{{_RIG}}}[$__range])) > 0)",
                "Those who sent requests with an API key.",
            ),
            _number(
                "Cost", "currencyUSD", _SPENT, "Energy, idle time, hardware; and other servers."
            ),
            _number(
                "Energy",
                "kwatth",
                f"sum(increase(rigserve_energy_joules_total{{{_MODEL}}}[$__range])) / 3.6e6",
                "Of requests; estimated where the rig has no meter.",
            ),
            _number(
                "Failed",
                "percentunit",
                f'(sum(increase(rigserve_requests_total{{{_MODEL}, status=~"5.."}}[$__range])) or vector(0)) '
                f"/ sum(increase(rigserve_requests_total{{{_MODEL}}}[$__range]))",
            ),
            _bars("The same tokens elsewhere", "currencyUSD", _SPENT_THERE, "{{compared_to}}", 12),
            _bars(
                "Saved, of what it would have cost there",
                "percentunit",
                f"1 - scalar({_SPENT}) / ({_SPENT_THERE} > 0)",
                "{{compared_to}}",
                12,
            ),
            _lines(
                "USD per million tokens",
                "currencyUSD",
                (
                    f"instance_model:rigserve_usd_per_million_tokens:rate1h{{{_MODEL}}}",
                    "here: {{model}}",
                ),
                (
                    f"avg by (compared_to) (instance_model_compared:rigserve_usd_per_million_tokens:rate1h{{{_MODEL}}})",
                    "{{compared_to}}",
                ),
                width=12,
            ),
            _lines(
                "Energy per generated token",
                "joule",
                (
                    f"instance_model:rigserve_joules_per_completion_token:rate1h{{{_MODEL}}}",
                    "{{model}}",
                ),
                width=12,
            ),
            _lines(
                "Requests per second",
                "reqps",
                (
                    f"sum by (model) (instance_model:rigserve_requests:rate5m{{{_MODEL}}})",
                    "{{model}}",
                ),
                width=12,
            ),
            _lines(
                "Tokens per second",
                "short",
                (
                    f"sum by (model) (instance_model:rigserve_prompt_tokens:rate5m{{{_MODEL}}})",
                    "{{model}} prompt",
                ),
                (
                    f"sum by (model) (instance_model:rigserve_completion_tokens:rate5m{{{_MODEL}}})",
                    "{{model}} generated",
                ),
                width=12,
            ),
        ),
    ),
    Board(
        "serving",
        "rigserve: serving",
        "How well requests are served, and why not better.",
        (
            _number("Engines ready", "short", f"sum(rigserve_engine_ready{{{_MODEL}}})"),
            _number("In flight", "short", f"sum(rigserve_requests_in_flight{{{_MODEL}}})"),
            _number("Waiting", "short", f"sum(rigserve_admission_waiting{{{_MODEL}}})"),
            _number(
                "First tokens in time",
                "percentunit",
                f"1 - max(instance_model:rigserve_ttft_slow:ratio_rate1h{{{_MODEL}}})",
                "Of the worst model, within the objective, in the last hour.",
            ),
            _number(
                "Gaps in time",
                "percentunit",
                f"1 - max(instance_model:rigserve_itl_slow:ratio_rate1h{{{_MODEL}}})",
                "As before, between tokens.",
            ),
            _number(
                "Failing",
                "percentunit",
                f"max(instance_model:rigserve_request_errors:ratio_rate5m{{{_MODEL}}})",
            ),
            _percentiles("Time to first token", "rigserve_time_to_first_token_seconds"),
            _percentiles("Inter-token latency", "rigserve_inter_token_latency_seconds"),
            _lines(
                "Queue time, p95",
                "s",
                (f"instance_model:rigserve_queue_time_seconds:p95_rate5m{{{_MODEL}}}", "{{model}}"),
            ),
            _lines(
                "Requests by status",
                "reqps",
                (f"sum by (status) (rate(rigserve_requests_total{{{_MODEL}}}[5m]))", "{{status}}"),
            ),
            _lines(
                "Waiting in the gateway",
                "short",
                (
                    f"sum by (model, priority) (rigserve_admission_waiting{{{_MODEL}}})",
                    "{{model}} {{priority}}",
                ),
            ),
            _lines(
                "Refused, and passed on by routes",
                "reqps",
                (
                    f"sum by (reason) (rate(rigserve_admission_refusals_total{{{_MODEL}}}[5m]))",
                    "refused: {{reason}}",
                ),
                (
                    f"sum by (reason) (rate(rigserve_route_passed_on_total{{{_MODEL}}}[5m]))",
                    "passed on: {{reason}}",
                ),
            ),
            _lines(
                "Sequences in slots",
                "short",
                (f"sum by (model) (rigserve_sequences_running{{{_MODEL}}})", "{{model}}"),
            ),
            _lines(
                "Batch: tokens a step",
                "short",
                (
                    f"sum by (model, phase) (rate(rigserve_engine_step_rows_sum{{{_MODEL}}}[5m])) "
                    f"/ (sum by (model, phase) (rate(rigserve_engine_step_rows_count{{{_MODEL}}}[5m])) > 0)",
                    "{{model}} {{phase}}",
                ),
            ),
            _lines(
                "Engine's time by part",
                "percentunit",
                (
                    f"sum by (model, part) (rate(rigserve_engine_step_seconds_total{{{_MODEL}}}[5m]))",
                    "{{model}} {{part}}",
                ),
                text="Seconds a second.",
            ),
            _lines(
                "KV cache in use",
                "percentunit",
                (f"instance_model:rigserve_kv_cache_used:ratio{{{_MODEL}}}", "{{model}}"),
            ),
            _lines(
                "Prompt tokens found cached",
                "percentunit",
                (f"instance_model:rigserve_cached_tokens:ratio_rate5m{{{_MODEL}}}", "{{model}}"),
            ),
            _lines(
                "Preemptions; drafts that proved right",
                "short",
                (
                    f"sum by (model) (rate(rigserve_preemptions_total{{{_MODEL}}}[5m]))",
                    "{{model}} preemptions a second",
                ),
                (
                    f"sum by (model) (rate(rigserve_accepted_draft_tokens_total{{{_MODEL}}}[5m])) "
                    f"/ (sum by (model) (rate(rigserve_draft_tokens_total{{{_MODEL}}}[5m])) > 0)",
                    "{{model}} share of drafts",
                ),
            ),
            _lines(
                "Swaps: engines by state",
                "short",
                (f"sum by (state) (rigserve_engine_state{{{_MODEL}}})", "{{state}}"),
                (f"sum(rigserve_engine_restarts{{{_MODEL}}})", "restarts so far"),
            ),
            _lines(
                "Memory of engines",
                "bytes",
                (
                    f"sum by (model, device) (rigserve_engine_memory_bytes{{{_MODEL}}})",
                    "{{model}} {{device}}",
                ),
                (f"sum by (model) (rigserve_prefix_cache_bytes{{{_MODEL}}})", "{{model}} prefixes"),
            ),
            _lines(
                "The machine",
                "percentunit",
                (
                    f"instance:rigserve_host_cpu_busy:ratio_rate5m{{{_RIG}}}",
                    "{{instance}} CPU busy",
                ),
                (
                    f"instance:rigserve_host_memory_available:ratio{{{_RIG}}}",
                    "{{instance}} memory available",
                ),
                (
                    f"instance_folder:rigserve_disk_free:ratio{{{_RIG}}}",
                    "{{instance}} disk free: {{folder}}",
                ),
            ),
        ),
    ),
    Board(
        "gpu",
        "rigserve: GPUs",
        "The NVIDIA cards, as NVML tells of them.",
        (
            _lines(
                "Utilization",
                "percentunit",
                (f"rigserve_gpu_utilization_ratio{{{_RIG}}}", "GPU {{gpu}}"),
                (f"rigserve_gpu_memory_utilization_ratio{{{_RIG}}}", "GPU {{gpu}} memory bus"),
            ),
            _lines(
                "Memory in use",
                "percentunit",
                (f"instance_gpu:rigserve_gpu_memory_used:ratio{{{_RIG}}}", "GPU {{gpu}}"),
            ),
            _lines(
                "Power",
                "watt",
                (f"rigserve_gpu_power_watts{{{_RIG}}}", "GPU {{gpu}}"),
                (f"rigserve_gpu_power_limit_watts{{{_RIG}}}", "GPU {{gpu}} limit"),
            ),
            _lines(
                "Temperature",
                "celsius",
                (f"rigserve_gpu_temperature_celsius{{{_RIG}}}", "GPU {{gpu}}"),
                (f"rigserve_gpu_slowdown_celsius{{{_RIG}}}", "GPU {{gpu}} slows down"),
            ),
            _lines(
                "Clocks", "hertz", (f"rigserve_gpu_clock_hertz{{{_RIG}}}", "GPU {{gpu}} {{domain}}")
            ),
            _lines(
                "Clocks held down",
                "short",
                (f"rigserve_gpu_throttled{{{_RIG}}}", "GPU {{gpu}} {{reason}}"),
            ),
            _lines("Fan", "percentunit", (f"rigserve_gpu_fan_ratio{{{_RIG}}}", "GPU {{gpu}}")),
            _lines(
                "PCIe packets sent again, a minute",
                "short",
                (f"60 * rate(rigserve_gpu_pcie_replays_total{{{_RIG}}}[5m])", "GPU {{gpu}}"),
            ),
            _lines("Processes", "short", (f"rigserve_gpu_processes{{{_RIG}}}", "GPU {{gpu}}")),
            _bars(
                "Energy",
                "kwatth",
                f"increase(rigserve_gpu_energy_joules_total{{{_RIG}}}[$__range]) / 3.6e6",
                "{{instance}} GPU {{gpu}}",
                12,
            ),
            _bars(
                "Cards",
                "short",
                f"rigserve_gpu_info{{{_RIG}}}",
                "{{instance}} GPU {{gpu}}: {{name}}, driver {{driver}}",
                12,
            ),
        ),
        has_models=False,
    ),
    Board(
        "tenants",
        "rigserve: tenants",
        "Who uses the rigs, and who is turned away.",
        (
            _bars(
                "Requests",
                "short",
                f"sum by (tenant) (increase(rigserve_tenant_requests_total{{{_RIG}}}[$__range]))",
                "{{tenant}}",
            ),
            _bars(
                "Tokens",
                "short",
                f"sum by (tenant) (increase(rigserve_tenant_tokens_total{{{_RIG}}}[$__range]))",
                "{{tenant}}",
            ),
            _bars(
                "Cost",
                "currencyUSD",
                f"sum by (tenant) (increase(rigserve_tenant_cost_usd_total{{{_RIG}}}[$__range]))",
                "{{tenant}}",
            ),
            _lines(
                "Requests per second",
                "reqps",
                (
                    f"sum by (tenant) (rate(rigserve_tenant_requests_total{{{_RIG}}}[5m]))",
                    "{{tenant}}",
                ),
                width=12,
            ),
            _lines(
                "Tokens per second",
                "short",
                (
                    f"sum by (tenant, kind) (rate(rigserve_tenant_tokens_total{{{_RIG}}}[5m]))",
                    "{{tenant}} {{kind}}",
                ),
                width=12,
            ),
            _lines(
                "Turned away because of keys, by reason",
                "reqps",
                (f"sum by (reason) (rate(rigserve_refusals_total{{{_RIG}}}[5m]))", "{{reason}}"),
                width=12,
            ),
            _lines(
                "Budgets of commercial models",
                "percentunit",
                (
                    f"rigserve_api_spent_usd{{{_RIG}}} / rigserve_api_budget_usd{{{_RIG}}}",
                    "{{model}}, of the {{period}}'s",
                ),
                width=12,
            ),
        ),
        has_models=False,
    ),
)


def texts() -> dict[str, str]:
    """Each dashboard's file and what is in it."""
    return {f"{board.name}.json": _text(board) for board in BOARDS}


def _text(board: Board) -> str:
    built = (
        dashboard.Dashboard(board.title)
        .uid(f"rigserve-{board.name}")
        .description(board.text)
        .tags(["rigserve"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(types.DashboardCursorSync.CROSSHAIR)
        .link(_others())
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(_choice("instance", "Rig"))
    )
    if board.has_models:
        built.with_variable(_choice("model", "Model"))
    for panel in board.panels:
        built.with_panel(_panel(panel))
    encoded = JSONEncoder(sort_keys=True, indent=2).encode(built.build())
    return json.dumps(json.loads(encoded), indent=2, sort_keys=True) + "\n"


def _others() -> dashboard.DashboardLink:
    link = dashboard.DashboardLink("rigserve").type(types.DashboardLinkType.DASHBOARDS)
    return link.tags(["rigserve"]).as_dropdown(True).keep_time(True).include_vars(True)


def _choice(label: str, title: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(label)
        .label(title)
        .datasource(_SOURCE)
        .query(f"label_values(rigserve_engine_ready, {label})")
        .regex("/([^#]*)/" if label == "model" else "")
        .refresh(types.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def _panel(panel: Panel) -> stat.Panel | bargauge.Panel | timeseries.Panel:
    built: stat.Panel | bargauge.Panel | timeseries.Panel
    if panel.kind == "number":
        built = stat.Panel().graph_mode(common_types.BigValueGraphMode.NONE)
    elif panel.kind == "bars":
        built = bargauge.Panel().orientation(common_types.VizOrientation.HORIZONTAL)
    else:
        built = timeseries.Panel().legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(common_types.LegendDisplayMode.LIST)
            .placement(common_types.LegendPlacement.BOTTOM)
        )
        built.fill_opacity(8).min(0)
    built.title(panel.title).unit(panel.unit).datasource(_SOURCE).span(panel.width)
    built.height(4 if panel.kind == "number" else 8)
    if panel.text:
        built.description(panel.text)
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expression)
        if panel.kind == "lines":
            target.range()
        else:
            target.instant()
        built.with_target(target.legend_format(query.legend or "__auto"))
    return built


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in texts().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
