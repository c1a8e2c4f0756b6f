"""Is this rig cheaper than a commercial model, from when on, and what does the answer hang on?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.config import CostConfig
from serving.cost.model import DAYS_PER_YEAR, SECONDS_PER_YEAR, CostModel
from serving.cost.prices import PriceBook
from serving.cost.traffic import SECONDS_PER_DAY, Traffic
from serving.cost.uncertainty import (
    Figure,
    Interval,
    Swing,
    combined,
    figures_of,
    swings,
    varied,
)

# The claim that rigserve exists to test: self-hosting cuts the cost of an API by this much.
CLAIMED_SAVING_PERCENT = 95
_MONTHS_PER_YEAR = 12

Answer = Literal["yes", "no", "open"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """All costs here, beside one commercial model's price for the same traffic.

    Prices are USD per million tokens of the traffic, prompts and completions together. ``cheaper_here`` and
    ``claim_holds`` are ``open`` where the interval of the saving holds both answers. Utilizations above 1
    cannot be reached; None is never. ``payback_months`` is None when the API is cheaper to go on with.
    ``tornado`` holds the saving in per cent at the ends of each figure's range, ``here_swings`` and
    ``there_swings`` the prices.
    """

    reference: str
    here_usd_per_million: Interval
    there_usd_per_million: Interval
    saving_percent: Interval
    cheaper_here: Answer
    claim_holds: Answer
    break_even_utilization: float | None
    claim_utilization: float | None
    break_even_tokens_per_day: float | None
    most_tokens_per_day: float
    payback_months: float | None
    tornado: tuple[Swing, ...]
    here_swings: tuple[Swing, ...]
    there_swings: tuple[Swing, ...]


def verdict_on(
    traffic: Traffic, config: CostConfig, prices: PriceBook, reference: str
) -> Verdict | None:
    """The verdict against one model; None where nothing was used, or the traffic costs nothing there."""
    there_usd = usd_there(traffic, config, prices, reference)
    if not traffic.tokens or not traffic.busy_seconds or not there_usd:
        return None
    here_usd = usd_here(traffic, config)
    figures = figures_of(config, traffic.energy_source)

    per_million = 1e6 / traffic.tokens

    def here(figure: Figure, value: float) -> float:
        factor = value if figure.name == "energy" else 1.0
        return per_million * usd_here(traffic, varied(config, figure, value), factor)

    def there(figure: Figure, value: float) -> float:
        return per_million * usd_there(traffic, varied(config, figure, value), prices, reference)

    def ratio(figure: Figure, value: float) -> float:
        return here(figure, value) / there(figure, value)

    here_swings, there_swings = swings(figures, here), swings(figures, there)
    ratios = combined(here_usd / there_usd, swings(figures, ratio))
    saving = Interval(*(100 * (1 - each) for each in (ratios.value, ratios.high, ratios.low)))
    tornado = swings(figures, lambda figure, value: 100 * (1 - ratio(figure, value)))
    even = utilization_for(there_usd, traffic, config)
    most_tokens_per_day = SECONDS_PER_DAY * traffic.tokens / traffic.busy_seconds
    return Verdict(
        reference=reference,
        here_usd_per_million=combined(here_usd * per_million, here_swings),
        there_usd_per_million=combined(there_usd * per_million, there_swings),
        saving_percent=saving,
        cheaper_here=_answer(saving, 0.0),
        claim_holds=_answer(saving, CLAIMED_SAVING_PERCENT),
        break_even_utilization=even,
        claim_utilization=utilization_for(
            there_usd * (1 - CLAIMED_SAVING_PERCENT / 100), traffic, config
        ),
        break_even_tokens_per_day=None if even is None else even * most_tokens_per_day,
        most_tokens_per_day=most_tokens_per_day,
        payback_months=_payback_months(there_usd, traffic, config),
        tornado=_moving(tornado),
        here_swings=_moving(here_swings),
        there_swings=_moving(there_swings),
    )


def _moving(swung: tuple[Swing, ...]) -> tuple[Swing, ...]:
    return tuple(each for each in swung if each.width > 0)


def usd_here(traffic: Traffic, config: CostConfig, energy_factor: float = 1.0) -> float:
    """All costs of the traffic here."""
    joules = traffic.energy_joules * energy_factor
    return CostModel(config).parts(traffic.busy_seconds, joules).total_usd


def usd_there(traffic: Traffic, config: CostConfig, prices: PriceBook, reference: str) -> float:
    """The price of the very requests at a commercial model."""
    tokens, hits = config.tokens_there_per_token, config.cache_hits_there
    return sum(prices.group_usd(reference, group, tokens, hits) for group in traffic.groups)


def utilization_for(target_usd: float, traffic: Traffic, config: CostConfig) -> float | None:
    """The utilization at which the traffic costs so much here; None if it costs more at any."""
    model = CostModel(config)
    busy = traffic.busy_seconds
    energy_usd = traffic.energy_joules * model.mean_usd_per_joule
    idle_usd = busy * config.power.idle_watts * model.mean_usd_per_joule
    hardware_usd = busy * model.lifetime_hardware_usd / (config.lifetime_years * SECONDS_PER_YEAR)
    left_usd = target_usd - energy_usd + idle_usd
    return (idle_usd + hardware_usd) / left_usd if left_usd > 0 else None


def _payback_months(there_usd: float, traffic: Traffic, config: CostConfig) -> float | None:
    model, share = CostModel(config), config.utilization
    seconds_per_month = DAYS_PER_YEAR * SECONDS_PER_DAY / _MONTHS_PER_YEAR
    # How often the traffic fits into a month.
    times = share * seconds_per_month / traffic.busy_seconds
    running_usd = (
        times * traffic.energy_joules * model.mean_usd_per_joule
        + (1 - share) * seconds_per_month * config.power.idle_watts * model.mean_usd_per_joule
        + config.hardware_price_usd * config.maintenance_share_per_year / _MONTHS_PER_YEAR
    )
    saved_usd = times * there_usd - running_usd
    return config.hardware_price_usd / saved_usd if saved_usd > 0 else None


def _answer(saving: Interval, wanted_percent: float) -> Answer:
    if saving.low >= wanted_percent:
        return "yes"
    return "open" if saving.high >= wanted_percent else "no"
