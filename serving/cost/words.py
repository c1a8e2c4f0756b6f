"""A cost report in sentences and sums, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from serving.cost.comparison import ComparisonRow, CostReport
from serving.cost.model import JOULES_PER_KWH, SECONDS_PER_YEAR
from serving.cost.money import Currency, saving_text
from serving.cost.uncertainty import Figure, Interval
from serving.cost.verdict import CLAIMED_SAVING_PERCENT, Verdict

_NOTHING = (
    "nothing to compare with: cost.compare_to names no model that would charge for this traffic"
)


def currency_of(report: CostReport) -> Currency:
    """What its amounts are shown in."""
    return Currency(report.assumptions.currency, report.assumptions.usd_per_unit)


def verdict_text(report: CostReport) -> str:
    """The answer in a few plain sentences."""
    return " ".join(verdict_sentences(report))


def verdict_sentences(report: CostReport) -> list[str]:
    """Who is cheaper, whether the claim holds, from when on it pays, and what that rests on."""
    verdict, money = report.verdict, currency_of(report)
    if verdict is None:
        return [f"Verdict: {_NOTHING}."]
    here, there = verdict.here_usd_per_million, verdict.there_usd_per_million
    sentences = [
        f"Verdict: a million tokens of this traffic cost {interval_text(here, money)} here, all costs "
        f"counted, and {interval_text(there, money)} at {verdict.reference}.",
        _answer(verdict),
        _claim(verdict, report),
        _break_even(verdict, report),
    ]
    if report.estimated:
        sentences.append("These figures rest on estimates.")
    sentences.append("A model's quality is not part of its price.")
    return sentences


def interval_text(interval: Interval, money: Currency) -> str:
    """``$0.26 ($0.12 to $0.51)``, or one amount where nothing is uncertain."""
    if interval.low == interval.high:
        return money.text(interval.value)
    low, high = money.text(interval.low), money.text(interval.high)
    return f"{money.text(interval.value)} ({low} to {high})"


def _answer(verdict: Verdict) -> str:
    saving = verdict.saving_percent
    between = f"between {_percent(saving.low)} and {_percent(saving.high)}"
    if verdict.cheaper_here == "yes":
        return f"This rig is cheaper: it saves {_percent(saving.value)} ({between})."
    if verdict.cheaper_here == "no":
        return (
            f"The API is cheaper: this rig saves {_percent(saving.value)} ({between}), "
            "which is a loss."
        )
    leaning = "this rig" if saving.value >= 0 else "the API"
    return (
        f"It is too close to tell: as given {leaning} is cheaper (a saving of "
        f"{_percent(saving.value)}), but it lies {between}."
    )


def _percent(value: float) -> str:
    """Never rounded towards the claim."""
    return saving_text(value) if value >= 0 else f"−{-value:,.0f} %"


def _claim(verdict: Verdict, report: CostReport) -> str:
    claim = f"The sources' claim, {CLAIMED_SAVING_PERCENT} % cheaper,"
    at = verdict.claim_utilization
    if at is None:
        when = "and would not at any utilization: the energy alone costs more"
    elif at > 1:
        when = "and would not even if it worked all the time"
    else:
        when = f"from a utilization of {at:.1%} on"
    if verdict.claim_holds == "yes":
        return f"{claim} holds ({when})."
    if verdict.claim_holds == "no":
        joint = when if at is None or at > 1 else f"it would {when}"
        return f"{claim} does not hold here, {joint}."
    assumed = report.assumptions.utilization
    return (
        f"{claim} cannot be told from figures this uncertain: as given it holds "
        f"{when if at is not None and at <= 1 else 'never'} (assumed: {assumed:.0%})."
    )


def _break_even(verdict: Verdict, report: CostReport) -> str:
    even, most = verdict.break_even_utilization, verdict.most_tokens_per_day
    if even is None or verdict.break_even_tokens_per_day is None:
        return "There is no break-even: each token's energy here costs more than the token there."
    tokens = f"{_count(verdict.break_even_tokens_per_day)} tokens a day"
    if even > 1:
        return (
            f"Break-even would be at {tokens}, more than the {_count(most)} that this rig can make."
        )
    text = (
        f"Break-even is at {tokens}, a utilization of {even:.1%}; this rig can make {_count(most)}."
    )
    months, life = verdict.payback_months, report.assumptions.lifetime_years * 12
    if months is None:
        return f"{text} At {report.assumptions.utilization:.0%} its running costs alone exceed the API's bill."
    late = ", longer than it is to last" if months > life else ""
    return (
        f"{text} At {report.assumptions.utilization:.0%} utilization the saved bills repay its price "
        f"in {months:,.1f} months{late}."
    )


def _count(value: float) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:,.2f} {name}"
    return f"{value:,.0f}"


def figure_text(figure: Figure, value: float, money: Currency) -> str:
    """A figure's value in its unit."""
    if figure.name == "electricity_usd_per_kwh":
        return f"{money.text(value)}/kWh"
    if figure.name.endswith("_usd"):
        return money.text(value)
    if figure.name in ("utilization", "cache_hits_there", "maintenance_share_per_year"):
        return f"{value:.3g}" if value > 1 else f"{100 * value:.3g} %"
    unit = {"lifetime_years": " years", "idle_watts": " W"}.get(figure.name, "")
    return f"{value:.3g}{unit}"


@dataclass(frozen=True, slots=True)
class Step:
    """A line of the computation: what, by which sum, and what comes out."""

    name: str
    formula: str
    result: str


def computation(report: CostReport) -> Iterator[Step]:
    """Each amount of the report from what was measured and assumed, for a person with a calculator."""
    traffic, given, money, parts = (
        report.traffic,
        report.assumptions,
        currency_of(report),
        report.parts,
    )
    busy = traffic.busy_seconds
    unit = given.usd_per_unit
    price = money.exact
    overhead = "" if given.cooling_overhead == 1 else f" × {given.cooling_overhead:g}"
    kwh = f"{given.mean_usd_per_kwh / unit:.6g}{overhead} / {JOULES_PER_KWH:g}"
    yield Step(
        "busy time",
        f"{traffic.prefill_busy_seconds:.6g} s prefill + {traffic.decode_busy_seconds:.6g} s decode",
        f"{busy:.6g} s",
    )
    yield Step("energy", f"{traffic.energy_joules:.6g} J × {kwh}", price(parts.energy_usd))
    yield Step(
        "of it idle draw", f"{traffic.idle_joules:.6g} J × {kwh}", price(parts.idle_energy_usd)
    )
    share = given.utilization
    yield Step(
        "idle hours",
        f"{busy:.6g} s × {given.idle_watts:g} W × (1 − {share:g}) / {share:g} × {kwh}",
        price(parts.idle_usd),
    )
    upkeep = ""
    if given.maintenance_share_per_year:
        upkeep = (
            f" + {given.hardware_price_usd / unit:g} × {given.maintenance_share_per_year:g} "
            f"× {given.lifetime_years:g}"
        )
    resale = f" − {given.resale_usd / unit:g}" if given.resale_usd else ""
    yield Step(
        "hardware",
        f"{busy:.6g} s × ({given.hardware_price_usd / unit:g}{resale}{upkeep}) / "
        f"({given.lifetime_years:g} × {SECONDS_PER_YEAR:.0f} s × {share:g})",
        price(parts.hardware_usd),
    )
    total = report.here_fully_loaded
    yield Step("all costs", "energy + idle hours + hardware", price(total.traffic_usd))
    sides = (
        ("input", traffic.prefill_busy_seconds, traffic.prompt_tokens, total.input_usd_per_million),
        (
            "output",
            traffic.decode_busy_seconds,
            traffic.completion_tokens,
            total.output_usd_per_million,
        ),
    )
    for name, seconds, tokens, usd in sides:
        if usd is not None:
            yield Step(
                f"{name}, a million tokens",
                f"{total.traffic_usd / unit:.6g} × {seconds:.6g} s / {busy:.6g} s / {tokens} × 1e6",
                price(usd),
            )


def computation_there(row: ComparisonRow, report: CostReport) -> Iterator[Step]:
    """The price of the traffic at a commercial model, group by group of one price."""
    given, money = report.assumptions, currency_of(report)
    tokens_there, hits = given.tokens_there_per_token, given.cache_hits_there
    scale = "" if tokens_there == 1 else f" × {tokens_there:g}"
    for priced in row.groups:
        tokens, rates = priced.tokens, priced.rates
        cached = tokens.cached_tokens * hits
        name = [f"{tokens.requests:,} requests"]
        if tokens.longer_than:
            name.append(f"prompts over {tokens.longer_than:,} tokens")
        if tokens.service_tier != "default":
            name.append(tokens.service_tier)
        fee = f" + {tokens.requests} × {rates.request_usd:g}" if rates.request_usd else ""
        yield Step(
            ", ".join(name),
            f"({tokens.prompt_tokens - cached:.10g} × {rates.input_usd:g} + {cached:.10g} × "
            f"{rates.cached_input_usd:g} + {tokens.completion_tokens} × {rates.output_usd:g}){scale} / 1e6{fee}"
            + ("" if given.usd_per_unit == 1 else f" USD / {given.usd_per_unit:g}"),
            money.exact(priced.usd),
        )
