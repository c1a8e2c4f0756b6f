"""A cost report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from serving.cost.comparison import CostReport
from serving.cost.money import saving_text
from serving.cost.uncertainty import Swing
from serving.cost.words import (
    Step,
    computation,
    computation_of_verdict,
    computation_there,
    currency_of,
    figure_text,
    idle_text,
    verdict_text,
)

_BAR_CELLS = 12


def render(report: CostReport, *, steps: bool = False) -> Group:
    """The report: what was measured, what is assumed, prices here and there, the verdict and what it hangs on.

    ``steps`` adds the computation of every amount.
    """
    parts: list[RenderableType] = [
        _basis(report),
        _table(report),
        Text(),
        Text(verdict_text(report)),
    ]
    if report.verdict is not None:
        parts += [Text(), _tornado(report.verdict.tornado, report)]
    if steps:
        parts += [Text(), _steps("This rig", computation(report))]
        for row in report.rows:
            parts += [Text(), _steps(row.reference, computation_there(row, report))]
        if report.verdict is not None:
            title = f"The verdict, against {report.verdict.reference}"
            parts += [Text(), _steps(title, computation_of_verdict(report, report.verdict))]
    return Group(*parts)


def _basis(report: CostReport) -> Text:
    traffic, assumed, money = report.traffic, report.assumptions, currency_of(report)
    extras = []
    if assumed.resale_usd:
        extras.append(f"resale {money.text(assumed.resale_usd)}")
    if assumed.maintenance_share_per_year:
        extras.append(f"maintenance {assumed.maintenance_share_per_year:.1%} a year")
    if assumed.cooling_overhead != 1:
        extras.append(f"cooling ×{assumed.cooling_overhead:g}")
    if assumed.mean_usd_per_kwh != assumed.electricity_usd_per_kwh:
        extras.append(f"{money.text(assumed.mean_usd_per_kwh)}/kWh in the mean of the day")
    if assumed.tokens_there_per_token != 1:
        extras.append(f"{assumed.tokens_there_per_token:g} tokens there for one here")
    if assumed.cache_hits_there != 1:
        extras.append(f"{assumed.cache_hits_there:.0%} of cache hits hit there")
    if assumed.currency != "USD":
        extras.append(f"1 {assumed.currency} = {assumed.usd_per_unit:g} USD")
    more = f" Also: {', '.join(extras)}." if extras else ""
    seen = ""
    if traffic.elapsed_seconds > traffic.busy_seconds > 0:
        seen = f" ({traffic.busy_seconds / traffic.elapsed_seconds:.1%} of the time it spans)"
    counted = "" if traffic.tokens_source == "engine" else f" (source: {traffic.tokens_source})"
    return Text(
        f"Traffic: {traffic.requests:,} requests, {traffic.prompt_tokens:,} prompt tokens "
        f"({traffic.cached_tokens:,} cached), {traffic.completion_tokens:,} generated{counted}.\n"
        f"Engine time: {traffic.prefill_busy_seconds:,.1f} s prefill, "
        f"{traffic.decode_busy_seconds:,.1f} s decode{seen} (source: {traffic.timing_source}). "
        f"Energy: {traffic.energy_joules:,.0f} J, of which {traffic.idle_joules:,.0f} J idle draw "
        f"(source: {traffic.energy_source}).\n"
        f"Your figures: {money.text(assumed.hardware_price_usd).removesuffix('.00')} over "
        f"{assumed.lifetime_years:g} years at {assumed.utilization:.0%} utilization, "
        f"{money.text(assumed.electricity_usd_per_kwh)}/kWh, {idle_text(report)}, "
        f"{assumed.load_watts:g} W load (where not measured).{more}\n"
        f"This traffic cost {money.text(report.here_as_run.traffic_usd)} in energy, "
        f"{money.text(report.here_fully_loaded.traffic_usd)} with all costs.\n"
    )


def _table(report: CostReport) -> Table:
    label = "estimated" if report.estimated else "measured"
    money = currency_of(report)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"{money.code} per million tokens (this rig: {label})",
        title_justify="left",
        caption=(
            "Savings are on this traffic, priced there request by request: context tiers, cached "
            f"prompts and batches at their prices. Prices: {report.prices_source}."
        ),
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    for heading in ("input", "cached", "output", "saving,\nas run", "saving,\nall costs"):
        table.add_column(heading, justify="right")
    for name, price in (
        ("this rig, marginal", report.here_marginal),
        ("this rig, as run", report.here_as_run),
        ("this rig, all costs", report.here_fully_loaded),
    ):
        table.add_row(
            name,
            money.text(price.input_usd_per_million),
            "",
            money.text(price.output_usd_per_million),
            style="bold",
        )
    table.add_section()
    for row in report.rows:
        table.add_row(
            row.reference,
            money.rate(row.input_usd_per_million),
            money.rate(row.cached_input_usd_per_million),
            money.rate(row.output_usd_per_million),
            saving_text(row.saving_percent_as_run),
            saving_text(row.saving_percent_fully_loaded),
        )
    return table


def _tornado(swings: Iterable[Swing], report: CostReport) -> Table:
    swings = list(swings)
    money = currency_of(report)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title="What the saving hangs on, all costs counted",
        title_justify="left",
        caption=f"Each figure by itself; * is a range of yours, the others are assumed. Peer: {report.peer_basis}.",
        caption_justify="left",
    )
    # Wide enough for its longest word beside the widest losses, on 80 columns.
    table.add_column("figure", min_width=11, overflow="fold")
    for heading in ("from", "to", "saving\nfrom", "to"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    widest = max((swing.width for swing in swings), default=1.0)
    for swing in swings:
        figure = swing.figure
        table.add_row(
            f"{figure.label}{'*' if figure.basis == 'yours' else ''}",
            figure_text(figure, figure.low, money),
            figure_text(figure, figure.high, money),
            saving_text(swing.at_low),
            saving_text(swing.at_high),
            "█" * max(round(_BAR_CELLS * swing.width / widest), 1),
        )
    return table


def _steps(title: str, steps: Iterable[Step]) -> Table:
    table = Table(
        box=None, title=title, title_justify="left", show_header=False, padding=(0, 1, 0, 0)
    )
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    for step in steps:
        table.add_row(step.name, step.formula, f"= {step.result}")
    return table
