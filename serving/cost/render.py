"""A cost report as text for a terminal."""

from __future__ import annotations

import math

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from serving.cost.comparison import CostReport

# The claim that rigserve exists to test: self-hosting cuts the cost of an API by this much.
CLAIMED_SAVING_PERCENT = 95


def render(report: CostReport) -> Group:
    """The report: what was measured, what is assumed, prices here and there, and the verdict."""
    return Group(_basis(report), _table(report), Text(verdict(report)))


def _basis(report: CostReport) -> Text:
    traffic, assumed = report.traffic, report.assumptions
    return Text(
        f"Traffic: {traffic.requests:,} requests, {traffic.prompt_tokens:,} prompt tokens "
        f"({traffic.cached_tokens:,} cached), {traffic.completion_tokens:,} generated.\n"
        f"Engine time: {traffic.prefill_busy_seconds:,.1f} s prefill, "
        f"{traffic.decode_busy_seconds:,.1f} s decode (source: {traffic.timing_source}). "
        f"Energy: {traffic.energy_joules:,.0f} J (source: {traffic.energy_source}).\n"
        f"Your figures: ${assumed.hardware_price_usd:,.0f} over {assumed.lifetime_years:g} years at "
        f"{assumed.utilization:.0%} utilization, ${assumed.electricity_usd_per_kwh:.2f}/kWh, "
        f"{assumed.idle_watts:g} W idle, {assumed.load_watts:g} W load (where not measured).\n"
        f"This traffic cost {usd_text(report.here_energy_only.traffic_usd)} in energy, "
        f"{usd_text(report.here_fully_loaded.traffic_usd)} with all costs.\n"
    )


def _table(report: CostReport) -> Table:
    label = "estimated" if report.estimated else "measured"
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"USD per million tokens (this rig: {label})",
        title_justify="left",
        caption=f"Savings are on this traffic. Commercial prices: {report.prices_source}.",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    for heading in ("input", "output", "saving,\nenergy", "saving,\nall costs"):
        table.add_column(heading, justify="right")
    for name, price in (
        ("this rig, energy only", report.here_energy_only),
        ("this rig, all costs", report.here_fully_loaded),
    ):
        table.add_row(
            name,
            usd_text(price.input_usd_per_million),
            usd_text(price.output_usd_per_million),
            style="bold",
        )
    table.add_section()
    for row in report.rows:
        table.add_row(
            row.reference,
            usd_text(row.input_usd_per_million),
            usd_text(row.output_usd_per_million),
            saving_text(row.saving_percent_energy_only),
            saving_text(row.saving_percent_fully_loaded),
        )
    return table


def usd_text(value: float | None) -> str:
    """A price to read: cents from a dollar on, two significant digits below."""
    if value is None:
        return "-"
    if value >= 1 or value <= 0:
        return f"${value:,.2f}"
    decimals = 1 - math.floor(math.log10(value))
    return f"${value:.{decimals}f}"


def saving_text(percent: float | None) -> str:
    """A saving in per cent, or the loss it is."""
    if percent is None:
        return "-"
    if percent >= 0:
        # Rounded down: 94.96 % must not read as the claim come true, nor 99.96 % as free.
        return f"{math.floor(10 * percent) / 10:.1f} %"
    return f"LOSS {-percent:,.1f} %" if percent > -10 else f"LOSS {-percent:,.0f} %"


def verdict(report: CostReport) -> str:
    """One or two plain sentences: is this rig cheaper, and does the claimed saving hold?"""
    if not any(row.traffic_usd for row in report.rows):
        return (
            "Verdict: nothing to compare with (cost.compare_to is empty, or nothing was generated)."
        )
    here_usd = report.here_fully_loaded.traffic_usd
    cheaper = [row.reference for row in report.rows if here_usd < row.traffic_usd]
    claim = [
        row.reference
        for row in report.rows
        if (row.saving_percent_fully_loaded or 0.0) >= CLAIMED_SAVING_PERCENT
    ]
    basis = "With all costs counted"
    if not cheaper:
        first = f"{basis}, every compared API is cheaper than this rig for this traffic."
    elif len(cheaper) == len(report.rows):
        first = f"{basis}, this rig is cheaper than every compared API for this traffic."
    else:
        first = (
            f"{basis}, this rig is cheaper than {len(cheaper)} of {len(report.rows)} compared APIs "
            "for this traffic; the others are cheaper."
        )
    if len(claim) == len(report.rows):
        second = "The sources' claim, 95 % cheaper, holds against all of them."
    elif claim:
        second = f"The sources' claim, 95 % cheaper, holds only against {', '.join(claim)}."
    else:
        second = "The sources' claim, 95 % cheaper, does not hold here."
    caveat = " These figures rest on estimates." if report.estimated else ""
    return f"Verdict: {first} {second}{caveat} A model's quality is not part of its price."
