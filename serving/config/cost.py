"""The ``cost`` section: what the rig costs its owner, how well that is known, and whom to compare with."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from serving.config.section import Section

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?([A-Z]{3})")
_TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d")
_URL = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")

Usd = Annotated[
    float,
    Field(ge=0),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0},
                {"type": "string", "pattern": f"^{_AMOUNT.pattern}$"},
            ]
        }
    ),
]
"""An amount in USD; in the file also text such as ``729 EUR``, if ``currencies`` has its rate."""

Range = tuple[float, float]


class UsdPerMillion(Section):
    """What a million tokens cost."""

    input: float = Field(ge=0, description="Tokens of prompts.")
    cached_input: float | None = Field(
        None, ge=0, description="Those of them that were cached there. Unset: as the others."
    )
    output: float = Field(ge=0, description="Generated tokens.")


class MeterConfig(Section):
    """A meter at the wall, which sees the whole machine. It is asked over HTTP."""

    kind: Literal["shelly", "tasmota", "prometheus"] = Field(
        description="Who answers: a Shelly plug (either generation), Tasmota, or a Prometheus server."
    )
    url: str = Field(description="Its base URL, such as http://192.168.1.20.")
    channel: int = Field(0, ge=0, description="Which of a Shelly's outlets, from 0 on.")
    query: str | None = Field(
        None,
        min_length=1,
        description="For prometheus: PromQL whose one result is the watts drawn now, such as sum(plug_power_watts).",
    )
    interval_seconds: float = Field(
        1.0, ge=0.2, description="How often it is read. Plugs refresh about once a second."
    )

    @field_validator("url")
    @classmethod
    def _is_a_base_url(cls, value: str) -> str:
        if not _URL.fullmatch(value):
            raise ValueError(f"{value!r} is no URL, such as http://192.168.1.20; no user, no query")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _only_prometheus_has_queries(self) -> MeterConfig:
        if (self.kind == "prometheus") != (self.query is not None):
            raise ValueError("kind: prometheus and a query go together; set both or neither")
        return self


class PowerConfig(Section):
    """Who measures the rig's draw, and what to assume where nothing does; then figures are labelled `estimated`."""

    idle_watts: float = Field(
        25.0,
        ge=0,
        description="The rig's draw while it waits: what idle hours cost, with a meter, too.",
    )
    load_watts: float = Field(
        95.0, ge=0, description="The rig's draw while it generates, where nothing measures."
    )
    meter: MeterConfig | None = Field(
        None, description="A meter at the wall. Unset: the cards' own (NVML), else RAPL."
    )

    @model_validator(mode="after")
    def _load_above_idle(self) -> PowerConfig:
        if self.load_watts < self.idle_watts:
            raise ValueError(
                f"load_watts ({self.load_watts}) is below idle_watts ({self.idle_watts})"
            )
        return self


class TariffHours(Section):
    """Hours of every day in which electricity has another price, by this machine's clock."""

    begin: str = Field(description="From when on, as HH:MM.")
    end: str = Field(description="Until when, as HH:MM; before `begin` is the next day's.")
    usd_per_kwh: Usd = Field(description="The price in these hours.")

    @field_validator("begin", "end")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError(f"{value!r} is no time of day, such as 22:00 (in quotes)")
        return value

    @model_validator(mode="after")
    def _is_some_time(self) -> TariffHours:
        if self.begin == self.end:
            raise ValueError(f"begin and end are both {self.begin}; hours that never end are none")
        return self

    @property
    def minutes(self) -> tuple[int, int]:
        """Begin and end in minutes after midnight."""
        begin, end = ((int(text[:2]) * 60 + int(text[3:])) for text in (self.begin, self.end))
        return begin, end


class RangesConfig(Section):
    """How well the figures are known: the least and the most that each may be. Unset: an assumed range."""

    hardware_price_usd: Range | None = Field(None, strict=False)
    resale_usd: Range | None = Field(None, strict=False)
    lifetime_years: Range | None = Field(None, strict=False)
    maintenance_share_per_year: Range | None = Field(None, strict=False)
    utilization: Range | None = Field(None, strict=False)
    electricity_usd_per_kwh: Range | None = Field(
        None, strict=False, description="Prices of the tariff's hours move with it."
    )
    cooling_overhead: Range | None = Field(None, strict=False)
    idle_watts: Range | None = Field(None, strict=False)
    energy: Range | None = Field(
        None,
        strict=False,
        description="What was really used, over what the meter (or the estimate) says.",
    )
    tokens_there_per_token: Range | None = Field(None, strict=False)
    cache_hits_there: Range | None = Field(None, strict=False)


class CostConfig(Section):
    """What the rig costs its owner. These are the operator's own figures; every report prints them.

    Amounts are USD, or text such as ``729 EUR`` where ``currencies`` has a rate.
    """

    hardware_price_usd: Usd = Field(800.0, description="What the rig cost.")
    resale_usd: Usd = Field(0.0, description="What it will still fetch when its lifetime is over.")
    lifetime_years: float = Field(
        3.0, gt=0, description="Years over which the price, less the resale, is written off."
    )
    maintenance_share_per_year: float = Field(
        0.0, ge=0, description="Repairs and spare parts in a year, as a share of the price."
    )
    utilization: float = Field(
        0.25, gt=0, le=1, description="Share of the lifetime in which the rig generates tokens."
    )
    electricity_usd_per_kwh: Usd = Field(0.30, description="Price of electricity.")
    tariff: tuple[TariffHours, ...] = Field(
        (),
        strict=False,
        description="Hours in which it has another price; the first that fits counts.",
    )
    cooling_overhead: float = Field(
        1.0,
        ge=1,
        description="Energy in all over the rig's own (PUE): 1.3 where an air conditioner takes 0.3 kWh for each of the rig's.",
    )
    power: PowerConfig = PowerConfig()
    carbon_grams_per_kwh: float | None = Field(
        None, ge=0, description="CO2 equivalent of the electricity, in grams. Unset: not reported."
    )
    currencies: dict[str, float] = Field(
        {}, description="USD for one unit of each currency that is used here, such as {EUR: 1.08}."
    )
    currency: str = Field(
        "USD", description="What reports show amounts in; one of the currencies, or USD."
    )
    compare_to: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Commercial models to compare with, as PROVIDER/MODEL of genai-prices; verdicts are against the first. Empty: peers of the same class are suggested.",
    )
    prices: dict[str, UsdPerMillion] = Field(
        {},
        description="Prices that count instead of those of genai-prices, or that it lacks, by PROVIDER/MODEL.",
    )
    tokens_there_per_token: float = Field(
        1.0, gt=0, description="Tokens that the same text is to a commercial model, for one here."
    )
    cache_hits_there: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the prompt tokens cached here that would be cached there, too.",
    )
    ranges: RangesConfig = RangesConfig()

    @model_validator(mode="before")
    @classmethod
    def _amounts_in_usd(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        rates = values.get("currencies")
        return _in_usd(values, rates if isinstance(rates, dict) else {})

    @field_validator("currencies")
    @classmethod
    def _rates_are_positive(cls, value: dict[str, float]) -> dict[str, float]:
        for code, rate in value.items():
            if not re.fullmatch("[A-Z]{3}", code) or code == "USD" or rate <= 0:
                raise ValueError(
                    f"{code}: {rate} is no rate; write a code of three letters, not USD, and the USD for one"
                )
        return value

    @field_validator("compare_to")
    @classmethod
    def _provider_and_model(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for reference in value:
            _check_reference(reference)
        return value

    @field_validator("prices")
    @classmethod
    def _prices_have_references(cls, value: dict[str, UsdPerMillion]) -> dict[str, UsdPerMillion]:
        for reference in value:
            _check_reference(reference)
        return value

    @model_validator(mode="after")
    def _figures_go_together(self) -> CostConfig:
        if self.resale_usd > self.hardware_price_usd:
            raise ValueError(
                f"resale_usd ({self.resale_usd:g}) is above hardware_price_usd ({self.hardware_price_usd:g})"
            )
        if self.currency != "USD" and self.currency not in self.currencies:
            raise ValueError(f"currency: {self.currency} has no rate; add it to currencies")
        for name in RangesConfig.model_fields:
            given: Range | None = getattr(self.ranges, name)
            if given is None:
                continue
            figure = 1.0 if name == "energy" else self.figure(name)
            low, high = given
            if not 0 <= low <= figure <= high:
                raise ValueError(
                    f"ranges.{name}: [{low:g}, {high:g}] must be the least and the most, and hold {figure:g}"
                )
            most = {"utilization": 1.0, "cache_hits_there": 1.0}.get(name)
            if most is not None and high > most:
                raise ValueError(f"ranges.{name}: no more than {most:g} is possible, not {high:g}")
            if name in ("utilization", "lifetime_years", "tokens_there_per_token") and low == 0:
                raise ValueError(f"ranges.{name}: the least must be above 0")
            if name == "cooling_overhead" and low < 1:
                raise ValueError("ranges.cooling_overhead: the least is 1, no overhead at all")
        return self

    def figure(self, name: str) -> float:
        """One of the figures that have ranges, by name."""
        value: float = self.power.idle_watts if name == "idle_watts" else getattr(self, name)
        return value


def _check_reference(reference: str) -> None:
    provider, _, model = reference.partition("/")
    if not provider or not model:
        raise ValueError(
            f"{reference!r} is not of the form PROVIDER/MODEL, such as openai/gpt-4o-mini"
        )


def _in_usd(value: Any, rates: dict[str, Any], key: str = "") -> Any:
    """The section with all amounts of other currencies in USD."""
    if isinstance(value, dict):
        return {name: _in_usd(each, rates, str(name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_in_usd(each, rates, key) for each in value]
    if not isinstance(value, str) or "usd" not in key or not (match := _AMOUNT.fullmatch(value)):
        return value
    rate = 1.0 if match[2] == "USD" else rates.get(match[2])
    if not isinstance(rate, int | float):
        raise ValueError(f"{key}: {value!r}: currencies has no rate for {match[2]}")
    return float(match[1]) * rate
