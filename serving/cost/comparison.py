"""The rig's price of a million tokens beside commercial ones, for the traffic that was measured."""

from __future__ import annotations

from dataclasses import dataclass

from serving.config import CostConfig
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook
from serving.cost.traffic import Traffic

_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class RigPrice:
    """What the traffic cost here. A price is None when there were no such tokens."""

    input_usd_per_million: float | None
    output_usd_per_million: float | None
    traffic_usd: float


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A commercial model: list prices, the same traffic there, and what is saved here (negative: lost)."""

    reference: str
    input_usd_per_million: float
    cached_input_usd_per_million: float | None
    output_usd_per_million: float
    traffic_usd: float
    saving_percent_energy_only: float | None
    saving_percent_fully_loaded: float | None


@dataclass(frozen=True, slots=True)
class Assumptions:
    """The operator's own figures, as configured."""

    hardware_price_usd: float
    lifetime_years: float
    utilization: float
    electricity_usd_per_kwh: float
    idle_watts: float
    load_watts: float


@dataclass(frozen=True, slots=True)
class CostReport:
    """All that is needed to print a comparison, and to compute it again by hand."""

    traffic: Traffic
    assumptions: Assumptions
    here_energy_only: RigPrice
    here_fully_loaded: RigPrice
    rows: tuple[ComparisonRow, ...]
    prices_source: str
    estimated: bool


def compare(traffic: Traffic, config: CostConfig, prices: PriceBook) -> CostReport:
    """Price the traffic here and at every model of the price book, cheapest there first."""
    parts = CostModel(config).parts(traffic.busy_seconds, traffic.energy_joules)
    energy_only = _rig_price(parts.energy_usd, traffic)
    fully_loaded = _rig_price(parts.total_usd, traffic)
    rows = (
        _row(reference, traffic, prices, energy_only, fully_loaded)
        for reference in prices.references
    )
    return CostReport(
        traffic=traffic,
        assumptions=Assumptions(
            hardware_price_usd=config.hardware_price_usd,
            lifetime_years=config.lifetime_years,
            utilization=config.utilization,
            electricity_usd_per_kwh=config.electricity_usd_per_kwh,
            idle_watts=config.power.idle_watts,
            load_watts=config.power.load_watts,
        ),
        here_energy_only=energy_only,
        here_fully_loaded=fully_loaded,
        rows=tuple(sorted(rows, key=lambda row: row.traffic_usd)),
        prices_source=prices.source,
        estimated=traffic.estimated,
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
    prices: PriceBook,
    energy_only: RigPrice,
    fully_loaded: RigPrice,
) -> ComparisonRow:
    listed = prices.per_million(reference)
    there_usd = _traffic_usd(reference, traffic, prices)

    def saving_percent(here: RigPrice) -> float | None:
        return 100 * (1 - here.traffic_usd / there_usd) if there_usd else None

    return ComparisonRow(
        reference=reference,
        input_usd_per_million=listed.input_usd,
        cached_input_usd_per_million=listed.cached_input_usd,
        output_usd_per_million=listed.output_usd,
        traffic_usd=there_usd,
        saving_percent_energy_only=saving_percent(energy_only),
        saving_percent_fully_loaded=saving_percent(fully_loaded),
    )


def _traffic_usd(reference: str, traffic: Traffic, prices: PriceBook) -> float:
    """Context tiers go by the request, so the mean request is priced, and multiplied."""
    if not traffic.requests:
        return 0.0
    return traffic.requests * prices.usd(
        reference,
        traffic.prompt_tokens / traffic.requests,
        traffic.cached_tokens / traffic.requests,
        traffic.completion_tokens / traffic.requests,
    )
