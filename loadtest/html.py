"""The report as one self-contained HTML page: no script, no request to anywhere."""

from __future__ import annotations

from html import escape

from loadtest import cost_section, sections
from loadtest.markdown import goodput, notes, number
from loadtest.report import Report
from loadtest.statistics import Distribution
from serving.cost.words import currency_of

STYLE = """
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
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(205px, 22%), 1fr)); gap: 12px; margin-top: 16px; }
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
.chart .line { fill: none; stroke-width: 2; } .chart .whisker { stroke-width: 1.5; opacity: .55; }
.chart .line.s0, .chart .whisker.s0 { stroke: var(--accent); } .chart .line.s1, .chart .whisker.s1 { stroke: var(--wait); }
.chart .dot.s0 { fill: var(--accent); } .chart .dot.s1 { fill: var(--wait); } .k0 { background: var(--accent); } .k1 { background: var(--wait); }
.chart .knee { stroke: var(--soft); stroke-dasharray: 3 3; } td small { display: block; color: var(--soft); font-size: .74rem; }
td.pass { color: var(--accent); font-weight: 600; } td.words { text-align: left; white-space: normal; } .doubt { color: var(--bad); font-weight: 700; }
.warning { border-left: 5px solid var(--bad); } .grid + .card, .card + .grid, .soft + .grid { margin-top: 14px; }
.bar-track.ratio b { top: 10px; height: 6px; border-radius: 3px; } .bar-track.ratio u { position: absolute; top: 7px; width: 12px; height: 12px;
  border-radius: 50%; margin-left: -6px; background: var(--other); } .ratio.worse u, .ratio.worse b { background: var(--bad); }
.ratio.better u, .ratio.better b { background: var(--accent); } .ratio b { opacity: .6; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 4px 0 10px; }
pre { overflow-x: auto; font-size: .82rem; margin: 0; }
@media (max-width: 600px) { main { padding: 18px 12px 40px; } .card { padding: 13px; } .tiles { grid-template-columns: 1fr 1fr; }
  .tiles .number { font-size: 1.3rem; } .bars { grid-template-columns: 1fr max-content; } .bar-track { height: 20px; }
  .bar-track b { top: 2px; height: 13px; } .bar-label { grid-column: 1 / -1; text-align: left; padding: 4px 0 0; }
  table, th { font-size: .78rem; } th, td { padding: 6px 3px; } th { white-space: normal; } td:first-child { white-space: normal; }
  .latencies :is(td, th):is(:nth-child(2), :nth-child(4), :nth-child(7)) { display: none; }
  .stages :is(td, th):is(:nth-child(2), :nth-child(4), :nth-child(6)), .tenants :is(td, th):is(:nth-child(3), :nth-child(7)) { display: none; }
  td small { font-size: .66rem; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #1b2330; --soft: #5b6678; --line: #dfe3ea;
  --accent: #0f766e; --accent-soft: #0f766e2b; --other: #94a3b8; --wait: #f0b429; --bad: #c2413b; }
  * { print-color-adjust: exact; } .card { break-inside: avoid; } main { max-width: none; padding: 0; }
  /* Paper does not scroll: the widest table fits A4. */
  table { font-size: .76rem; } th { font-size: .72rem; } th, td { padding: 4px 5px; } td:first-child { white-space: normal; }
  details .card { break-inside: auto; } tr { break-inside: avoid; } pre { white-space: pre-wrap; } }
"""


def render_html(report: Report) -> str:
    """The whole page."""
    cost, head = report.cost, report.headline
    title = f"{escape(report.model)}: load and cost"
    stages = len(report.stages)
    seconds = sum(one.stage.end - one.stage.begin for one in report.stages)
    body = [
        f"<h1>{title}</h1>",
        f'<p class="soft">{report.started:%Y-%m-%d %H:%M %Z} · {escape(report.options.url)} · scenario '
        f"{escape(report.options.scenario_name)} · "
        f"{escape(head.stage.label) if stages == 1 else f'{stages} stages'}, {seconds:.0f} s</p>",
        f'<p class="card verdict">{sections.summary_text(report)}</p>',
    ]
    if cost is not None:
        body.append(cost_section.verdict_card(cost))
    body.append(_tiles(report))
    body.extend(f'<p class="soft">Note: {escape(note)}</p>' for note in notes(report))
    body.append(sections.verdicts_section(report))
    body.append(sections.comparison_section(report))
    body.append(sections.load_section(report))
    if cost is not None:
        body.append(cost_section.cost_section(cost))
    body.append(sections.latency_section(report))
    body.append(sections.tenants_section(report))
    body.append(sections.time_section(report))
    body.append(sections.client_section(report))
    body.append(sections.settings_section(report))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{cost_section.STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _tiles(report: Report) -> str:
    summary, cost = report.headline.summary, report.cost
    tiles = [
        (
            number(summary.completion_tokens_per_second),
            "output tokens per second, "
            f"{number(summary.completion_tokens_per_second_per_user)} a user",
        ),
        (number(summary.requests_per_second, 2), "requests per second"),
        (_milliseconds(summary.ttft_seconds, "p50"), "time to first token, p50"),
        (_milliseconds(summary.tpot_seconds, "p50"), "time per output token, p50"),
        (f"{summary.totals.errors} of {summary.totals.requests}", "requests failed"),
    ]
    if summary.goodput is not None:
        tiles.append((goodput(summary), "of the requests within the SLO (goodput)"))
    if summary.cached_share is not None:
        tiles.append((f"{summary.cached_share:.0%}", "of the prompt tokens were cached"))
    if cost is not None:
        label = "estimated" if cost.estimated else "measured"
        price = cost.here_fully_loaded.output_usd_per_million
        tiles.insert(
            0, (currency_of(cost).text(price), f"a million output tokens here, all costs ({label})")
        )
    return '<div class="tiles">' + "".join(
        f'<div class="card"><div class="number">{escape(shown)}</div>'
        f'<div class="soft">{escape(text)}</div></div>'
        for shown, text in tiles
    ) + "</div>"  # fmt: skip


def _milliseconds(distribution: Distribution | None, which: str) -> str:
    return "-" if distribution is None else f"{getattr(distribution, which) * 1e3:,.1f} ms"
