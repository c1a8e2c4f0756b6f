"""Amounts to read. All are kept and computed in USD; what is shown may be another currency."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.config import CostConfig


@dataclass(frozen=True, slots=True)
class Currency:
    """What amounts are shown in."""

    code: str = "USD"
    usd_per_unit: float = 1.0

    @staticmethod
    def of(config: CostConfig) -> Currency:
        """The one that the operator wants to see."""
        return Currency(config.currency, config.currencies.get(config.currency, 1.0))

    @property
    def unit(self) -> str:
        """What stands before an amount."""
        return "$" if self.code == "USD" else f"{self.code} "

    def text(self, usd: float | None) -> str:
        """An amount: cents from one on, two significant digits below."""
        if usd is None:
            return "-"
        value = usd / self.usd_per_unit
        if abs(value) >= 1 or value == 0:
            return f"{self.unit}{value:,.2f}"
        decimals = 1 - math.floor(math.log10(abs(value)))
        return f"{self.unit}{value:.{decimals}f}"

    def rate(self, usd: float | None) -> str:
        """A list price, as exact as it is listed."""
        if usd is None:
            return "-"
        value = usd / self.usd_per_unit
        digits = f"{value:.6g}"
        places = len(digits.partition(".")[2])
        return f"{self.unit}{digits if places > 2 else f'{value:,.2f}'}"

    def exact(self, usd: float) -> str:
        """An amount to compute with: six significant digits."""
        return f"{self.unit}{usd / self.usd_per_unit:.6g}"


USD = Currency()


def saving_text(percent: float | None) -> str:
    """A saving in per cent, or the loss it is."""
    if percent is None:
        return "-"
    if percent >= 0:
        # Rounded down: 94.96 % must not read as the claim come true, nor 99.96 % as free.
        return f"{math.floor(10 * percent) / 10:.1f} %"
    return f"LOSS {-percent:,.1f} %" if percent > -10 else f"LOSS {-percent:,.0f} %"
