"""What the rig's time and energy cost. The equations are explained in docs/cost-model.md."""

from __future__ import annotations

import time
from dataclasses import dataclass

from serving.config import CostConfig

JOULES_PER_KWH = 3.6e6
DAYS_PER_YEAR = 365.25
SECONDS_PER_YEAR = DAYS_PER_YEAR * 86400
_MINUTES_PER_DAY = 24 * 60


@dataclass(frozen=True, slots=True)
class CostParts:
    """A cost in USD: energy used, the idle energy that comes with it, and the wear of the hardware."""

    energy_usd: float
    idle_usd: float
    hardware_usd: float

    @property
    def total_usd(self) -> float:
        """Fully loaded."""
        return self.energy_usd + self.idle_usd + self.hardware_usd


class CostModel:
    """Prices engine time and energy with the operator's figures."""

    def __init__(self, config: CostConfig) -> None:
        self._config = config
        self.mean_usd_per_kwh = _mean_usd_per_kwh(config)
        self.mean_usd_per_joule = self._usd_per_joule(self.mean_usd_per_kwh)
        life_seconds = config.lifetime_years * SECONDS_PER_YEAR
        self.lifetime_hardware_usd = (
            config.hardware_price_usd
            - config.resale_usd
            + config.hardware_price_usd * config.maintenance_share_per_year * config.lifetime_years
        )
        self.hardware_usd_per_second = self.lifetime_hardware_usd / (
            life_seconds * config.utilization
        )
        # Each busy second pays for the idle seconds that come with it at this utilization. They are
        # spread over all hours of the day.
        idle_seconds = (1 - config.utilization) / config.utilization
        self.idle_usd_per_second = config.power.idle_watts * idle_seconds * self.mean_usd_per_joule

    def parts(
        self, busy_seconds: float, energy_joules: float, at_unix: float | None = None
    ) -> CostParts:
        """The cost of so much engine time that used so much energy, at a moment or at the day's mean price."""
        rate = self.mean_usd_per_joule if at_unix is None else self.usd_per_joule(at_unix)
        return CostParts(
            energy_usd=energy_joules * rate,
            idle_usd=busy_seconds * self.idle_usd_per_second,
            hardware_usd=busy_seconds * self.hardware_usd_per_second,
        )

    def usd_per_joule(self, at_unix: float) -> float:
        """The price of energy at a moment, cooling included, by this machine's clock."""
        local = time.localtime(at_unix)
        return self._usd_per_joule(_usd_per_kwh(self._config, local.tm_hour * 60 + local.tm_min))

    def _usd_per_joule(self, usd_per_kwh: float) -> float:
        return usd_per_kwh * self._config.cooling_overhead / JOULES_PER_KWH


def _usd_per_kwh(config: CostConfig, minute: int) -> float:
    for hours in config.tariff:
        begin, end = hours.minutes
        inside = begin <= minute < end if begin < end else minute >= begin or minute < end
        if inside:
            return hours.usd_per_kwh
    return config.electricity_usd_per_kwh


def _mean_usd_per_kwh(config: CostConfig) -> float:
    """Over all minutes of a day."""
    if not config.tariff:
        return config.electricity_usd_per_kwh
    minutes = range(_MINUTES_PER_DAY)
    return sum(_usd_per_kwh(config, minute) for minute in minutes) / _MINUTES_PER_DAY
