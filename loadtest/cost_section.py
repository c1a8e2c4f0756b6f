"""The report's section on cost: what a million tokens cost here and there, and how each amount comes about."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from loadtest import charts
from serving.cost.comparison import CostReport
from serving.cost.model import JOULES_PER_KWH
from serving.cost.money import saving_text
from serving.cost.uncertainty import Swing
from serving.cost.verdict import CLAIMED_SAVING_PERCENT, Verdict
from serving.cost.words import (
    Step,
    computation,
    computation_of_verdict,
    computation_there,
    currency_of,
    figure_text,
    idle_text,
    verdict_sentences,
)

_LEAST_SHARE, _STEPS = 0.01, 40

STYLE = """
.tornado { display: grid; grid-template-columns: minmax(6em, auto) max-content minmax(120px, 1fr) max-content; align-items: center; gap: 2px 12px; font-size: .88rem; }
.tornado .soft { font-size: .8rem; } .tornado div:nth-child(4n+2), .tornado div:nth-child(4n) { text-align: right; font-variant-numeric: tabular-nums; }
.swing { position: relative; height: 22px; } .swing b { position: absolute; top: 4px; height: 14px; border-radius: 3px; background: var(--accent); }
.swing i { position: absolute; height: 100%; border-left: 1px solid var(--line); } .swing i.given { border-left: 2px solid var(--ink); }
.swing i.none { border-left: 1px dashed var(--bad); }
.steps { width: 100%; font-size: .84rem; } .steps td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.steps td:last-child { text-align: right; white-space: nowrap; font-weight: 600; } details summary { cursor: pointer; margin: 14px 0 8px; font-weight: 600; }
.chart .there { stroke: var(--other); stroke-width: 2; stroke-dasharray: 6 4; } .chart .claim { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 3; }
@media (max-width: 600px) { .costs :is(td, th):is(:nth-child(3), :nth-child(5), :nth-child(6)) { display: none; }
  .tornado { grid-template-columns: 1fr max-content; } .tornado div:nth-child(4n+3) { grid-column: 1 / -1; grid-row: auto; }
  .tornado div:nth-child(4n) { grid-column: 1 / -1; text-align: left; color: var(--soft); padding-bottom: 6px; } }
/* What a click would open, paper shows. */
@media print { details::details-content { content-visibility: visible; } details summary { list-style: none; } }
"""


def verdict_card(cost: CostReport) -> str:
    """The answer, for the top of the page."""
    first, *rest = verdict_sentences(cost)
    return (
        f'<div class="card verdict"><p><b>{escape(first)}</b></p>'
        f"<p>{escape(' '.join(rest))}</p></div>"
    )


def cost_section(cost: CostReport) -> str:
    """Bars, the table, what the verdict hangs on, from which utilization on it turns, and all sums."""
    parts = [
        "<h2>What a million tokens cost</h2>",
        _bars(cost),
        _table(cost),
        _basis(cost),
    ]
    if cost.verdict is not None:
        parts.append(
            '<div class="grid" style="margin-top:14px">'
            f"{_by_utilization(cost, cost.verdict)}{_tornado(cost, cost.verdict)}</div>"
        )
    parts.append(_computations(cost))
    return "".join(parts)


def _bars(cost: CostReport) -> str:
    money = currency_of(cost)

    def bar(name: str, usd: float | None, *, ours: bool) -> charts.Bar:
        return charts.Bar(name, (usd or 0) / money.usd_per_unit, money.text(usd), ours)

    label = ", estimated" if cost.estimated else ""
    here = (
        (f"This rig, as run (energy{label})", cost.here_as_run),
        (f"This rig, all costs{f' ({label[2:]})' if label else ''}", cost.here_fully_loaded),
    )
    bars = [bar(name, price.output_usd_per_million, ours=True) for name, price in here]
    bars += [
        bar(row.reference, row.output_usd_per_million, ours=False)
        for row in sorted(cost.rows, key=lambda row: row.output_usd_per_million)
    ]
    return (
        '<figure class="card"><h3>Output tokens</h3>'
        f"{charts.log_bars(bars, f'{money.code} per million tokens')}</figure>"
    )


def _table(cost: CostReport) -> str:
    label = "estimated" if cost.estimated else "measured"
    money = currency_of(cost)
    rows = [
        f'<tr class="ours"><td>{name} ({label})</td><td>{money.text(price.input_usd_per_million)}</td>'
        f"<td></td><td>{money.text(price.output_usd_per_million)}</td><td>{money.text(price.traffic_usd)}</td>"
        "<td></td><td></td></tr>"
        for name, price in (
            ("This rig, marginal", cost.here_marginal),
            ("This rig, as run", cost.here_as_run),
            ("This rig, all costs", cost.here_fully_loaded),
        )
    ]
    rows += [
        f"<tr><td>{escape(row.reference).replace('/', '/<wbr>')}</td><td>{money.rate(row.input_usd_per_million)}</td>"
        f"<td>{money.rate(row.cached_input_usd_per_million)}</td><td>{money.rate(row.output_usd_per_million)}</td>"
        f"<td>{money.text(row.traffic_usd)}</td>"
        f"{_saving_cell(row.saving_percent_as_run)}{_saving_cell(row.saving_percent_fully_loaded)}</tr>"
        for row in cost.rows
    ]
    return (
        '<div class="card scroll" style="margin-top:14px"><table class="costs"><thead><tr>'
        f"<th>{money.code} per<br>million tokens</th><th>input</th><th>cached<br>input</th><th>output</th>"
        "<th>this<br>traffic</th><th>saving,<br>as run</th><th>saving,<br>all costs</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _saving_cell(percent: float | None) -> str:
    kind = ' class="loss"' if percent is not None and percent < 0 else ""
    return f"<td{kind}>{escape(saving_text(percent))}</td>"


def _basis(cost: CostReport) -> str:
    traffic, assumed, money = cost.traffic, cost.assumptions, currency_of(cost)
    rate = "" if money.code == "USD" else f" 1 {money.code} = {money.usd_per_unit:g} USD."
    return (
        f'<p class="soft">This traffic: {traffic.requests:,} requests, {traffic.prompt_tokens:,} prompt tokens '
        f"({traffic.cached_tokens:,} cached) and {traffic.completion_tokens:,} generated. Engine time: "
        f"{traffic.prefill_busy_seconds:,.2f} s on prompts, {traffic.decode_busy_seconds:,.2f} s on output "
        f"(source: {escape(traffic.timing_source)}). Energy: {traffic.energy_joules:,.0f} J, of which "
        f"{traffic.idle_joules:,.0f} J would be drawn without work, too (source: {escape(traffic.energy_source)}).<br>"
        f"The operator's figures: {money.text(assumed.hardware_price_usd)} over {assumed.lifetime_years:g} years at "
        f"{assumed.utilization:.0%} utilization, resale {money.text(assumed.resale_usd)}, maintenance "
        f"{assumed.maintenance_share_per_year:.1%} a year, {money.text(assumed.electricity_usd_per_kwh)} per kWh "
        f"({money.text(assumed.mean_usd_per_kwh)} in the mean of a day), cooling × {assumed.cooling_overhead:g}, "
        f"{idle_text(cost)}, {assumed.load_watts:g} W under load (used where no meter measures).{rate}<br>"
        "Marginal is the energy above idle; as run all energy while it worked; all costs are that, the idle hours "
        "between, and hardware. Elsewhere each request is priced by itself: context tiers, cached prompts and batches "
        f"at their prices. A token here is taken for {assumed.tokens_there_per_token:g} there: tokenizers differ. "
        f"Commercial prices: {escape(cost.prices_source)}. The peer of the verdict: {escape(cost.peer_basis)}. "
        "A model's quality is not part of its price.</p>"
    )


def _by_utilization(cost: CostReport, verdict: Verdict) -> str:
    """All costs of a million tokens over utilization, beside the API's price and a twentieth of it."""
    money, assumed = currency_of(cost), cost.assumptions
    unit, given = assumed.usd_per_unit, assumed.utilization
    usd_per_joule = assumed.mean_usd_per_kwh * assumed.cooling_overhead / JOULES_PER_KWH
    idle_usd = cost.traffic.busy_seconds * assumed.idle_watts * usd_per_joule
    hardware_usd = cost.parts.hardware_usd * given
    scale = 1e6 / cost.traffic.tokens / unit
    points = [
        (
            100 * share,
            scale * (cost.parts.energy_usd + idle_usd * (1 - share) / share + hardware_usd / share),
        )
        for share in (_LEAST_SHARE ** (1 - step / _STEPS) for step in range(_STEPS + 1))
    ]
    there = verdict.there_usd_per_million.value / unit
    lines = [("there", there), ("claim", there * (1 - CLAIMED_SAVING_PERCENT / 100))]
    return (
        '<figure class="card"><h3>All costs of a million tokens, by utilization</h3>'
        f"{charts.log_curve(points, lines, 'utilization in per cent', f'{money.code} per million tokens')}"
        f"<figcaption>Dashed: {escape(verdict.reference)}; dotted: {100 - CLAIMED_SAVING_PERCENT} % of it. "
        f"Assumed utilization: {given:.0%}.</figcaption></figure>"
    )


def _tornado(cost: CostReport, verdict: Verdict) -> str:
    if not verdict.tornado:
        return ""
    money = currency_of(cost)
    ends = [end for swing in verdict.tornado for end in (swing.at_low, swing.at_high)]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def place(percent: float) -> float:
        return 100 * (percent - low) / span

    none = f'<i class="none" style="left:{place(0):.1f}%"></i>' if low < 0 < high else ""

    def row(swing: Swing) -> str:
        left, right = sorted((swing.at_low, swing.at_high))
        figure = swing.figure
        least, most = (figure_text(figure, end, money) for end in (figure.low, figure.high))
        basis = "your range" if figure.basis == "yours" else "assumed range"
        return (
            f'<div>{escape(figure.label)}<br><span class="soft">{basis}</span></div>'
            f"<div>{escape(least)}<br>to {escape(most)}</div>"
            f'<div class="swing">{none}'
            f'<i class="given" style="left:{place(verdict.saving_percent.value):.1f}%"></i>'
            f'<b style="left:{place(left):.1f}%;width:max({place(right) - place(left):.1f}%,2px)"></b></div>'
            f"<div>{escape(saving_text(swing.at_low))}<br>to {escape(saving_text(swing.at_high))}</div>"
        )

    return (
        '<figure class="card"><h3>What the saving hangs on</h3>'
        f'<div class="tornado">{"".join(map(row, verdict.tornado))}</div>'
        f"<figcaption>The saving against {escape(verdict.reference)}, all costs, as each figure by itself goes through "
        f"its range. The line is the saving as given{'; the dashed one is none' if none else ''}.</figcaption></figure>"
    )


def _computations(cost: CostReport) -> str:
    there = "".join(
        f"<h3>{escape(row.reference)}</h3>{_steps(computation_there(row, cost))}"
        for row in cost.rows
    )
    verdict = ""
    if cost.verdict is not None:
        verdict = (
            f"<h3>The verdict, against {escape(cost.verdict.reference)}</h3>"
            f"{_steps(computation_of_verdict(cost, cost.verdict))}"
        )
    return (
        '<details><summary>How each amount is computed</summary><div class="card">'
        f"<h3>This rig</h3>{_steps(computation(cost))}{there}{verdict}</div></details>"
    )


def _steps(steps: Iterable[Step]) -> str:
    rows = "".join(
        f"<tr><td>{escape(step.name)}</td><td>{escape(step.formula)}</td><td>{escape(step.result)}</td></tr>"
        for step in steps
    )
    return f'<table class="steps"><tbody>{rows}</tbody></table>'
