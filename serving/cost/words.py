"""A cost report in sentences and sums, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from serving.cost.comparison import ComparisonRow, CostReport
from serving.cost.model import JOULES_PER_KWH, SECONDS_PER_YEAR
from serving.cost.money import Currency, saving_text
from serving.cost.traffic import SECONDS_PER_DAY
from serving.cost.uncertainty import Figure, Interval, Swing
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
    if value >= 0:
        return saving_text(value)
    return f"−{-value:,.1f} %" if value > -10 else f"−{-value:,.0f} %"


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
    """A figure's value in its unit, to read."""
    return _in_unit(figure, value, money.text, ".3g")


def _exact(figure: Figure, value: float, money: Currency) -> str:
    """A figure's value in its unit, to compute with."""
    return _in_unit(figure, value, money.exact, ".6g")


def _in_unit(figure: Figure, value: float, amount: Callable[[float], str], digits: str) -> str:
    if figure.name == "electricity_usd_per_kwh":
        return f"{amount(value)}/kWh"
    if figure.name.endswith("_usd"):
        return amount(value)
    if figure.name in ("utilization", "cache_hits_there", "maintenance_share_per_year"):
        return f"{value:{digits}}" if value > 1 else f"{100 * value:{digits}} %"
    unit = {"lifetime_years": " years", "idle_watts": " W"}.get(figure.name, "")
    return f"{value:{digits}}{unit}"


def idle_text(report: CostReport) -> str:
    """What is assumed of the draw while the rig waits, and what a meter saw of it."""
    assumed, seen = report.assumptions, report.traffic.measured_idle_watts
    told = "" if seen is None else f" ({report.traffic.energy_source} saw {seen:.3g} W)"
    return f"{assumed.idle_watts:g} W idle{told}"


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
    for name, formula, total in (
        ("marginal", "energy − of it idle draw", report.here_marginal),
        ("as run", "energy", report.here_as_run),
        ("all costs", "energy + idle hours + hardware", report.here_fully_loaded),
    ):
        yield Step(name, formula, price(total.traffic_usd))
        for side, seconds, tokens, usd in (
            ("input", traffic.prefill_busy_seconds, traffic.prompt_tokens, total.input_usd_per_million),
            ("output", traffic.decode_busy_seconds, traffic.completion_tokens, total.output_usd_per_million),
        ):  # fmt: skip
            if usd is not None:
                yield Step(
                    f"{name}: {side}, a million tokens",
                    f"{total.traffic_usd / unit:.6g} × {seconds:.6g} s / {busy:.6g} s / {tokens} × 1e6",
                    price(usd),
                )


def computation_of_verdict(report: CostReport, verdict: Verdict) -> Iterator[Step]:
    """Each figure of the verdict; those with an end of a range are the sums above, with it in the figure's place."""
    traffic, given, money = report.traffic, report.assumptions, currency_of(report)
    unit, tokens, busy = given.usd_per_unit, traffic.tokens, traffic.busy_seconds
    here, there = verdict.here_usd_per_million, verdict.there_usd_per_million
    here_usd = report.here_fully_loaded.traffic_usd / unit
    there_usd = there.value * tokens / 1e6 / unit
    for place, interval, swung, traffic_usd in (
        ("here", here, verdict.here_swings, here_usd),
        ("there", there, verdict.there_swings, there_usd),
    ):
        sum_of = f"{traffic.prompt_tokens} + {traffic.completion_tokens}"
        yield Step(
            f"{place}, a million tokens of this traffic",
            f"{traffic_usd:.6g} / ({sum_of}) × 1e6",
            money.exact(interval.value),
        )
        yield from _ends(place, interval, swung, money)
    yield Step(
        "saving", f"(1 − {here_usd:.6g} / {there_usd:.6g}) × 100", f"{verdict.saving_percent.value:.6g} %"
    )  # fmt: skip
    yield from _ends_of_saving(verdict, money)
    usd_per_watt_second = given.mean_usd_per_kwh * given.cooling_overhead / JOULES_PER_KWH / unit
    idle = busy * given.idle_watts * usd_per_watt_second
    hardware = report.parts.hardware_usd * given.utilization / unit
    energy = report.parts.energy_usd / unit
    even = verdict.break_even_utilization
    claimed = 1 - CLAIMED_SAVING_PERCENT / 100
    for name, utilization, target in (
        ("break-even utilization", even, f"{there_usd:.6g}"),
        (
            f"{CLAIMED_SAVING_PERCENT} % cheaper from a utilization of",
            verdict.claim_utilization,
            f"{there_usd:.6g} × {claimed:.2g}",
        ),
    ):
        if utilization is not None:
            yield Step(
                name,
                f"({busy:.6g} s × {given.idle_watts:g} W × {usd_per_watt_second:.6g} + {hardware:.6g}) / "
                f"({target} − {energy:.6g} + {idle:.6g})",
                f"{utilization:.6g}",
            )
    yield Step(
        "tokens a day at most",
        f"{SECONDS_PER_DAY} s × {tokens} / {busy:.6g} s",
        f"{verdict.most_tokens_per_day:.6g}",
    )
    if even is not None:
        yield Step(
            "break-even tokens a day",
            f"{even:.6g} × {SECONDS_PER_DAY} s × {tokens} / {busy:.6g} s",
            f"{verdict.break_even_tokens_per_day:.6g}",
        )
    if verdict.payback_months is not None:
        month, share, bought = (
            SECONDS_PER_YEAR / 12,
            given.utilization,
            given.hardware_price_usd / unit,
        )
        yield Step(
            "months until it has paid for itself",
            f"{bought:g} / ({month:.0f} s × ({share:g} × ({there_usd:.6g} − {energy:.6g}) / {busy:.6g} s − "
            f"(1 − {share:g}) × {given.idle_watts:g} W × {usd_per_watt_second:.6g}) − "
            f"{bought:g} × {given.maintenance_share_per_year:g} / 12)",
            f"{verdict.payback_months:.6g}",
        )


def _ends_of_saving(verdict: Verdict, money: Currency) -> Iterator[Step]:
    """The saving at both ends of each figure's range, and from these the ends of its interval."""
    here, there = verdict.here_usd_per_million, verdict.there_usd_per_million
    here_at, there_at = (
        {swing.figure.name: (swing.at_low, swing.at_high) for swing in swung}
        for swung in (verdict.here_swings, verdict.there_swings)
    )
    ratio = 1 - verdict.saving_percent.value / 100
    least, most = [], []
    for swing in verdict.tornado:
        figure = swing.figure
        usd_here = here_at.get(figure.name, (here.value, here.value))
        usd_there = there_at.get(figure.name, (there.value, there.value))
        percents = (swing.at_low, swing.at_high)
        for at, *usd, percent in zip(
            (figure.low, figure.high), usd_here, usd_there, percents, strict=True
        ):
            divided = " / ".join(f"{each / money.usd_per_unit:.6g}" for each in usd)
            yield Step(
                f"saving, with {figure.label} {_exact(figure, at, money)}",
                f"(1 − {divided}) × 100",
                f"{percent:.6g} %",
            )
        low, high = sorted(1 - percent / 100 for percent in percents)
        if high > ratio:
            least.append(f"ln²({high:.6g} / {ratio:.6g})")
        if 0 < low < ratio:
            most.append(f"ln²({ratio:.6g} / {low:.6g})")
    for name, sign, logs, percent in (
        ("least", "×", least, verdict.saving_percent.low),
        ("most", "/", most, verdict.saving_percent.high),
    ):
        if logs:
            yield Step(
                f"saving, the {name}",
                f"(1 − {ratio:.6g} {sign} exp(√({' + '.join(logs)}))) × 100",
                f"{percent:.6g} %",
            )


def _ends(
    place: str, interval: Interval, swung: tuple[Swing, ...], money: Currency
) -> Iterator[Step]:
    """The ends of an interval, from what each figure's range does by itself."""
    if not swung or not interval.value:
        return
    value = interval.value / money.usd_per_unit
    least, most = [], []
    for swing in swung:
        figure = swing.figure
        ends = (swing.at_low / money.usd_per_unit, swing.at_high / money.usd_per_unit)
        for at, usd in zip((figure.low, figure.high), ends, strict=True):
            yield Step(
                f"{place}, with {figure.label} {_exact(figure, at, money)}",
                "the same sums",
                money.exact(usd * money.usd_per_unit),
            )
        if min(ends) < value:
            least.append(f"ln²({value:.6g} / {min(ends):.6g})")
        if max(ends) > value:
            most.append(f"ln²({max(ends):.6g} / {value:.6g})")
    for name, sign, logs, usd in (
        ("least", "/", least, interval.low),
        ("most", "×", most, interval.high),
    ):
        if logs:
            yield Step(
                f"{place}, the {name}",
                f"{value:.6g} {sign} exp(√({' + '.join(logs)}))",
                money.exact(usd),
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
