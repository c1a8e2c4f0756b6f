"""The rig's price of a million tokens beside commercial ones, for the traffic that was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.config import CostConfig
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook, Rates
from serving.cost.traffic import TokenGroup, Traffic, merged
from serving.cost.uncertainty import Figure, figures_of
from serving.cost.verdict import Verdict, usd_there, verdict_on

_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class RigPrice:
    """What the traffic cost here. A price is None when there were no such tokens."""

    input_usd_per_million: float | None
    output_usd_per_million: float | None
    traffic_usd: float


@dataclass(frozen=True, slots=True)
class PricedGroup:
    """Requests of one price a token at a commercial model, that price, and what they cost there."""

    tokens: TokenGroup
    rates: Rates
    usd: float


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A commercial model: list prices, the same traffic there, and what is saved here (negative: lost)."""

    reference: str
    input_usd_per_million: float
    cached_input_usd_per_million: float | None
    output_usd_per_million: float
    traffic_usd: float
    saving_percent_as_run: float | None
    saving_percent_fully_loaded: float | None
    groups: tuple[PricedGroup, ...]


@dataclass(frozen=True, slots=True)
class Assumptions:
    """The operator's own figures, as configured; ``figures`` are those that are not known exactly."""

    hardware_price_usd: float
    resale_usd: float
    lifetime_years: float
    maintenance_share_per_year: float
    utilization: float
    electricity_usd_per_kwh: float
    mean_usd_per_kwh: float
    cooling_overhead: float
    idle_watts: float
    load_watts: float
    tokens_there_per_token: float
    cache_hits_there: float
    carbon_grams_per_kwh: float | None
    currency: str
    usd_per_unit: float
    figures: tuple[Figure, ...]


@dataclass(frozen=True, slots=True)
class Parts:
    """The cost of the traffic here, by what it is for."""

    energy_usd: float
    idle_energy_usd: float
    idle_usd: float
    hardware_usd: float


@dataclass(frozen=True, slots=True)
class CostReport:
    """All that is needed to print a comparison, and to compute it again by hand.

    Three prices here: ``marginal`` is the energy above what the rig draws anyway, ``as_run`` all energy
    while it worked, ``fully_loaded`` that and its idle time, wear and maintenance. ``verdict`` is against
    the first model to compare with, which ``peer_basis`` says who chose.
    """

    traffic: Traffic
    assumptions: Assumptions
    parts: Parts
    here_marginal: RigPrice
    here_as_run: RigPrice
    here_fully_loaded: RigPrice
    rows: tuple[ComparisonRow, ...]
    verdict: Verdict | None
    peer_basis: str
    prices_source: str
    estimated: bool


def compare(
    traffic: Traffic,
    config: CostConfig,
    prices: PriceBook,
    peer_basis: str = "the first of cost.compare_to",
) -> CostReport:
    """Price the traffic here and at every model of the price book, cheapest there first."""
    traffic = replace(traffic, groups=merged(traffic.groups, prices.cuts))
    model = CostModel(config)
    parts = model.parts(traffic.busy_seconds, traffic.energy_joules)
    idle_energy_usd = traffic.idle_joules * model.mean_usd_per_joule
    as_run = _rig_price(parts.energy_usd, traffic)
    fully_loaded = _rig_price(parts.total_usd, traffic)
    rows = (
        _row(reference, traffic, config, prices, as_run, fully_loaded)
        for reference in prices.references
    )
    peer = next(iter(prices.references), None)
    return CostReport(
        traffic=traffic,
        assumptions=_assumptions(config, model, traffic),
        parts=Parts(parts.energy_usd, idle_energy_usd, parts.idle_usd, parts.hardware_usd),
        here_marginal=_rig_price(parts.energy_usd - idle_energy_usd, traffic),
        here_as_run=as_run,
        here_fully_loaded=fully_loaded,
        rows=tuple(sorted(rows, key=lambda row: row.traffic_usd)),
        verdict=None if peer is None else verdict_on(traffic, config, prices, peer),
        peer_basis=peer_basis,
        prices_source=prices.source,
        estimated=traffic.estimated,
    )


def _assumptions(config: CostConfig, model: CostModel, traffic: Traffic) -> Assumptions:
    return Assumptions(
        hardware_price_usd=config.hardware_price_usd,
        resale_usd=config.resale_usd,
        lifetime_years=config.lifetime_years,
        maintenance_share_per_year=config.maintenance_share_per_year,
        utilization=config.utilization,
        electricity_usd_per_kwh=config.electricity_usd_per_kwh,
        mean_usd_per_kwh=model.mean_usd_per_kwh,
        cooling_overhead=config.cooling_overhead,
        idle_watts=config.power.idle_watts,
        load_watts=config.power.load_watts,
        tokens_there_per_token=config.tokens_there_per_token,
        cache_hits_there=config.cache_hits_there,
        carbon_grams_per_kwh=config.carbon_grams_per_kwh,
        currency=config.currency,
        usd_per_unit=config.currencies.get(config.currency, 1.0),
        figures=figures_of(config, traffic.energy_source),
    )


def _rig_price(usd: float, traffic: Traffic) -> RigPrice:
    """Share a cost between prompt and generated tokens by the engine time that each took."""

    def per_million(busy_seconds: float, tokens: int) -> float | None:
        if not tokens or not traffic.busy_seconds:
            return None
        return usd * busy_seconds / traffic.busy_seconds / tokens * _MILLION

    return RigPrice(
        input_usd_per_million=per_million(traffic.prefill_busy_seconds, traffic.prompt_tokens),
        output_usd_per_million=per_million(traffic.decode_busy_seconds, traffic.completion_tokens),
        traffic_usd=usd,
    )


def _row(
    reference: str,
    traffic: Traffic,
    config: CostConfig,
    prices: PriceBook,
    as_run: RigPrice,
    fully_loaded: RigPrice,
) -> ComparisonRow:
    listed = prices.per_million(reference)
    there_usd = usd_there(traffic, config, prices, reference)
    tokens, hits = config.tokens_there_per_token, config.cache_hits_there

    def saving_percent(here: RigPrice) -> float | None:
        return 100 * (1 - here.traffic_usd / there_usd) if there_usd else None

    return ComparisonRow(
        reference=reference,
        input_usd_per_million=listed.input_usd,
        cached_input_usd_per_million=listed.cached_input_usd,
        output_usd_per_million=listed.output_usd,
        traffic_usd=there_usd,
        saving_percent_as_run=saving_percent(as_run),
        saving_percent_fully_loaded=saving_percent(fully_loaded),
        groups=tuple(
            PricedGroup(
                group,
                prices.rates(reference, group.begin_unix, group.longer_than, group.service_tier),
                prices.group_usd(reference, group, tokens, hits),
            )
            for group in traffic.groups
        ),
    )
