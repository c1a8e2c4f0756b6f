"""The report as one self-contained HTML page: no script, no request to anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any

from loadtest import charts, cost_section
from loadtest.measures import Distribution, Summary, throughput_over_time
from loadtest.records import RequestRecord
from serving.cost.comparison import CostReport
from serving.cost.words import currency_of

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6678;
  --line: #dfe3ea; --accent: #0f766e; --accent-soft: #0f766e2b; --other: #94a3b8; --wait: #f0b429; --bad: #c2413b; }
@media (prefers-color-scheme: dark) { :root { --page: #11151c; --card: #1a202b; --ink: #e7ebf2; --soft: #9aa6b8;
  --line: #2d3645; --accent: #2dd4bf; --accent-soft: #2dd4bf2b; --other: #64748b; --wait: #d9a520; --bad: #f07167; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
p { margin: 8px 0; } .soft, figcaption { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px; }
.verdict { border-left: 5px solid var(--accent); font-size: 1.04rem; margin-top: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 16px; }
.tiles .number { font-size: 1.55rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
figure { margin: 0; } figure h3 { margin: 0 0 6px; font-size: .98rem; } figcaption { font-size: .85rem; margin-top: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 550; font-size: .86rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } tr.ours td { font-weight: 650; color: var(--accent); }
td.loss { color: var(--bad); font-weight: 600; }
.chart { width: 100%; height: auto; display: block; } .chart text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.chart .rule { stroke: var(--line); } .chart .curve { fill: none; stroke: var(--accent); stroke-width: 2; }
.chart .fill { fill: var(--accent-soft); } .chart .mark, .chart .stream { fill: var(--accent); }
.chart .wait { fill: var(--wait); } .chart .error { fill: var(--bad); }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; align-items: center; font-size: .88rem; }
.bar-label { text-align: right; padding-right: 12px; } .bar-value { font-weight: 600; padding-left: 10px; font-variant-numeric: tabular-nums; }
.bar-track { position: relative; height: 26px; } .bar-track i { position: absolute; height: 100%; border-left: 1px solid var(--line); }
.bar-track b { position: absolute; top: 5px; height: 16px; border-radius: 0 3px 3px 0; background: var(--other); }
.bar-track.ours b { background: var(--accent); } .bar-ticks { position: relative; height: 20px; }
.bar-ticks span { position: absolute; transform: translateX(-50%); } .bar-ticks, .bar-unit { color: var(--soft); font-size: .8rem; }
.bar-unit { grid-column: 1 / -1; text-align: center; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 4px 0 10px; }
pre { overflow-x: auto; font-size: .82rem; margin: 0; }
@media (max-width: 600px) { main { padding: 18px 12px 40px; } .card { padding: 13px; } .tiles { grid-template-columns: 1fr 1fr; }
  .tiles .number { font-size: 1.3rem; } .bars { grid-template-columns: 1fr max-content; } .bar-track { height: 20px; }
  .bar-track b { top: 2px; height: 13px; } .bar-label { grid-column: 1 / -1; text-align: left; padding: 4px 0 0; }
  table, th { font-size: .78rem; } th, td { padding: 6px 3px; } th { white-space: normal; } td:first-child { white-space: normal; }
  .prices :is(td, th):nth-child(4), .latencies :is(td, th):nth-child(6) { display: none; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #1b2330; --soft: #5b6678; --line: #dfe3ea;
  --accent: #0f766e; --accent-soft: #0f766e2b; --other: #94a3b8; --wait: #f0b429; --bad: #c2413b; }
  * { print-color-adjust: exact; } .card { break-inside: avoid; } main { max-width: none; padding: 0; } }
"""


def render_html(
    *,
    summary: Summary,
    records: Sequence[RequestRecord],
    cost: CostReport | None,
    model: str,
    started: datetime,
    settings: Mapping[str, Any],
    host: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The whole page."""
    body = [
        f"<h1>{escape(model)}: load and cost</h1>",
        f'<p class="soft">{started:%Y-%m-%d %H:%M %Z} · {escape(str(settings["url"]))} · '
        f"{settings['users']} users for {summary.window_seconds:.0f} s · about "
        f"{settings['prompt_tokens']} prompt and {settings['output_tokens']} output tokens a request</p>",
    ]
    if cost is not None:
        body.append(cost_section.verdict_card(cost))
    body.append(_tiles(summary, cost))
    body.extend(f'<p class="soft">Note: {escape(note)}</p>' for note in notes)
    if cost is not None:
        body.append(cost_section.cost_section(cost))
    body.append(_latency_section(summary, records))
    body.append(_time_section(records))
    body.append(_settings_section(settings, host))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(model)}: load and cost</title><style>{_STYLE}{cost_section.STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _tiles(summary: Summary, cost: CostReport | None) -> str:
    tiles = [
        (
            _number(summary.completion_tokens_per_second),
            "output tokens per second, "
            f"{_number(summary.completion_tokens_per_second_per_user)} a user",
        ),
        (_number(summary.requests_per_second, 2), "requests per second"),
        (_milliseconds(summary.ttft_seconds, "p50"), "time to first token, p50"),
        (_milliseconds(summary.tpot_seconds, "p50"), "time per output token, p50"),
        (f"{summary.totals.errors} of {summary.totals.requests}", "requests failed"),
    ]
    if cost is not None:
        label = "estimated" if cost.estimated else "measured"
        price = cost.here_fully_loaded.output_usd_per_million
        tiles.insert(
            0, (currency_of(cost).text(price), f"a million output tokens here, all costs ({label})")
        )
    return '<div class="tiles">' + "".join(
        f'<div class="card"><div class="number">{escape(number)}</div>'
        f'<div class="soft">{escape(text)}</div></div>'
        for number, text in tiles
    ) + "</div>"  # fmt: skip


def _latency_section(summary: Summary, records: Sequence[RequestRecord]) -> str:
    good = [record for record in records if record.error is None and not record.warmup]
    table = "".join(
        f"<tr><td>{name}</td>{_distribution_cells(distribution)}</tr>"
        for name, distribution in (
            ("Time to first token (TTFT)", summary.ttft_seconds),
            ("Inter-token latency (ITL)", summary.itl_seconds),
            ("Time per output token (TPOT)", summary.tpot_seconds),
            ("End to end", summary.end_to_end_seconds),
        )
    )
    figures = (
        _latency_figure(
            "Time to first token", [r.ttft_seconds for r in good], summary.ttft_seconds
        ),
        _latency_figure(
            "Inter-token latency",
            [gap for r in good for gap in r.chunk_gaps_seconds],
            summary.itl_seconds,
        ),
        _latency_figure(
            "Time per output token", [r.tpot_seconds for r in good], summary.tpot_seconds
        ),
        _latency_figure(
            "End to end", [r.end_to_end_seconds for r in good], summary.end_to_end_seconds
        ),
    )
    return (
        '<h2>Latency</h2><div class="card scroll"><table class="latencies"><thead><tr><th>milliseconds</th><th>mean</th>'
        f"<th>p50</th><th>p90</th><th>p99</th><th>values</th></tr></thead><tbody>{table}</tbody></table></div>"
        f'<div class="grid" style="margin-top:14px">{"".join(figures)}</div>'
    )


def _latency_figure(
    name: str, values: Sequence[float | None], distribution: Distribution | None
) -> str:
    if distribution is None:
        return ""
    known = [value * 1e3 for value in values if value is not None]
    marks = {
        50: distribution.p50 * 1e3,
        90: distribution.p90 * 1e3,
        99: distribution.p99 * 1e3,
    }
    caption = " · ".join(f"p{percent} {value:,.1f} ms" for percent, value in marks.items())
    return (
        f'<figure class="card"><h3>{name}</h3>{charts.cumulative(known, marks, "milliseconds")}'
        f"<figcaption>Dots: {caption}</figcaption></figure>"
    )


def _time_section(records: Sequence[RequestRecord]) -> str:
    measured = [record for record in records if not record.warmup]
    if not measured:
        return ""
    begin = min(record.started_at for record in measured)
    spans = [
        (
            record.user,
            record.started_at - begin,
            None if record.first_token_at is None else record.first_token_at - begin,
            record.ended_at - begin,
            record.error is not None,
        )
        for record in measured
    ]
    heading = "Every request"
    if len(spans) > charts.MOST_REQUESTS:
        heading = f"The first {charts.MOST_REQUESTS:,} of {len(spans):,} requests"
    rate = [(at - begin, value) for at, value in throughput_over_time(measured, 40)]
    return (
        '<h2>Over time</h2><div class="grid"><figure class="card"><h3>Output tokens per second</h3>'
        f"{charts.area(rate, 'seconds', 'tokens per second')}</figure>"
        f'<figure class="card"><h3>{heading}</h3>'
        f"{charts.timeline(spans, 'seconds')}<figcaption>"
        '<span class="key" style="background:var(--wait)"></span>waiting for the first token'
        '<span class="key" style="background:var(--accent)"></span>streaming'
        '<span class="key" style="background:var(--bad)"></span>failed</figcaption></figure></div>'
    )


def _settings_section(settings: Mapping[str, Any], host: Mapping[str, Any]) -> str:
    text = json.dumps({"settings": settings, "client_host": host}, indent=2)
    return f'<h2>To repeat it</h2><div class="card"><pre>{escape(text)}</pre></div>'


def _distribution_cells(distribution: Distribution | None) -> str:
    if distribution is None:
        return "<td>-</td>" * 5
    values = (distribution.mean, distribution.p50, distribution.p90, distribution.p99)
    return (
        "".join(f"<td>{value * 1e3:,.1f}</td>" for value in values)
        + f"<td>{distribution.count:,}</td>"
    )


def _number(value: float | None, digits: int = 1) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"


def _milliseconds(distribution: Distribution | None, which: str) -> str:
    return "-" if distribution is None else f"{getattr(distribution, which) * 1e3:,.1f} ms"
