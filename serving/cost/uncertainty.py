"""How well a cost is known: ranges of the figures that go into it, carried through to what comes out.

Each figure is moved to the ends of its range by itself; the ratios to the result that this makes are combined
in quadrature, as logarithms (docs/cost-model.md says why, and how to do it by hand).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serving.config import CostConfig, RangesConfig

_WALL = (0.98, 1.02)
# What was really drawn, over what is said: NVML and RAPL do not see the rest of the machine.
_ENERGY_RANGES: Mapping[str, tuple[float, float]] = {
    "nvml": (0.95, 1.40),
    "rapl": (0.95, 1.60),
    "shelly": _WALL,
    "tasmota": _WALL,
    "prometheus": _WALL,
}
_ENERGY_ESTIMATED = (0.70, 1.50)
_LABELS: Mapping[str, str] = {
    "hardware_price_usd": "hardware price",
    "resale_usd": "resale value",
    "lifetime_years": "lifetime",
    "maintenance_share_per_year": "maintenance a year",
    "utilization": "utilization",
    "electricity_usd_per_kwh": "electricity price",
    "cooling_overhead": "cooling overhead",
    "idle_watts": "idle draw",
    "energy": "energy used, over what is told",
    "tokens_there_per_token": "tokens there for one here",
    "cache_hits_there": "our cache hits that hit there",
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the least and the most that it may be."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """In another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Figure:
    """An input with its range. ``basis`` says whose the range is: the operator's, or assumed."""

    name: str
    label: str
    value: float
    low: float
    high: float
    basis: Literal["yours", "assumed"]


@dataclass(frozen=True, slots=True)
class Swing:
    """What a result becomes when one figure is at the ends of its range, and all others are as given."""

    figure: Figure
    at_low: float
    at_high: float

    @property
    def width(self) -> float:
        """How far the figure moves the result."""
        return abs(self.at_high - self.at_low)


def figures_of(config: CostConfig, energy_source: str) -> tuple[Figure, ...]:
    """All figures that are not known exactly, with the operator's ranges, or else assumed ones."""
    figures = []
    for name in RangesConfig.model_fields:
        value = 1.0 if name == "energy" else config.figure(name)
        given: tuple[float, float] | None = getattr(config.ranges, name)
        low, high = given or _assumed(name, value, config, energy_source)
        if low < high:
            basis: Literal["yours", "assumed"] = "yours" if given else "assumed"
            figures.append(Figure(name, _LABELS[name], value, low, high, basis))
    return tuple(figures)


def _assumed(
    name: str, value: float, config: CostConfig, energy_source: str
) -> tuple[float, float]:
    match name:
        case "energy":
            return _ENERGY_RANGES.get(energy_source, _ENERGY_ESTIMATED)
        case "utilization":
            return value / 2, min(2 * value, 1.0)
        case "lifetime_years":
            return value * 2 / 3, value * 4 / 3
        case "electricity_usd_per_kwh":
            return value * 0.8, value * 1.25
        case "idle_watts":
            return value * 0.7, value * 1.3
        case "resale_usd":
            return value / 2, min(
                max(1.5 * value, 0.2 * config.hardware_price_usd), config.hardware_price_usd
            )
        case "tokens_there_per_token":
            return value * 0.85, value * 1.2
        case "cache_hits_there":
            return 0.0, 1.0
    # What was paid is known, and so are shares that the operator has worked out.
    return value, value


def varied(config: CostConfig, figure: Figure, value: float) -> CostConfig:
    """The config with another value of a figure (``energy`` is not one of the config's)."""
    name = figure.name
    if name == "energy":
        return config
    if name == "idle_watts":
        power = config.power.model_copy(update={"idle_watts": value})
        return config.model_copy(update={"power": power})
    if name == "electricity_usd_per_kwh" and config.electricity_usd_per_kwh:
        factor = value / config.electricity_usd_per_kwh
        tariff = tuple(
            hours.model_copy(update={"usd_per_kwh": hours.usd_per_kwh * factor})
            for hours in config.tariff
        )
        return config.model_copy(update={name: value, "tariff": tariff})
    return config.model_copy(update={name: value})


def swings(
    figures: Iterable[Figure], result: Callable[[Figure, float], float]
) -> tuple[Swing, ...]:
    """Each figure's, the widest first; ``result`` is what comes out when a figure has a value."""
    all_swings = (
        Swing(figure, result(figure, figure.low), result(figure, figure.high)) for figure in figures
    )
    return tuple(sorted(all_swings, key=lambda swing: -swing.width))


def combined(value: float, swung: Sequence[Swing]) -> Interval:
    """The interval of a result that is never negative, from what each figure does to it by itself."""
    if not value:
        # There is no ratio to nothing: the ends add up.
        return Interval(value, 0.0, sum(max(each.at_low, each.at_high) for each in swung))
    down = up = 0.0
    for each in swung:
        low, high = sorted((each.at_low, each.at_high, value))[::2]
        up += math.log(high / value) ** 2
        down += math.log(max(low / value, 1e-9)) ** 2
    return Interval(value, value * math.exp(-math.sqrt(down)), value * math.exp(math.sqrt(up)))
