"""What the rig's time and energy cost. The equations are explained in docs/cost-model.md."""

from __future__ import annotations

from dataclasses import dataclass

from serving.config import CostConfig

JOULES_PER_KWH = 3.6e6
SECONDS_PER_YEAR = 365.25 * 86400


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
        self._usd_per_joule = config.electricity_usd_per_kwh / JOULES_PER_KWH
        busy_seconds_of_life = config.lifetime_years * SECONDS_PER_YEAR * config.utilization
        self._hardware_usd_per_second = config.hardware_price_usd / busy_seconds_of_life
        # Each busy second pays for the idle seconds that come with it at this utilization.
        idle_seconds = (1 - config.utilization) / config.utilization
        self._idle_usd_per_second = config.power.idle_watts * idle_seconds * self._usd_per_joule

    def parts(self, busy_seconds: float, energy_joules: float) -> CostParts:
        """The cost of so much engine time that used so much energy."""
        return CostParts(
            energy_usd=energy_joules * self._usd_per_joule,
            idle_usd=busy_seconds * self._idle_usd_per_second,
            hardware_usd=busy_seconds * self._hardware_usd_per_second,
        )
