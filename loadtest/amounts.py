"""Distributions of lengths and of waiting times, as scenarios write them."""

from __future__ import annotations

import math
import random
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from loadtest.section import Section


class Constant(Section):
    """Always the same. A bare number means this."""

    kind: Literal["constant"]
    value: float = Field(ge=0)

    def draw(self, _rng: random.Random) -> float:
        """One value."""
        return self.value

    @property
    def mean(self) -> float:
        """What draws are on average, before bounds."""
        return self.value


class _Bounded(Section):
    min: float = Field(0, ge=0, description="Smaller draws become this.")
    max: float | None = Field(None, gt=0, description="Larger draws become this.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max is {self.max:g}, below min, which is {self.min:g}; swap them")
        return self

    def _within(self, value: float) -> float:
        return min(max(value, self.min), math.inf if self.max is None else self.max)


class Uniform(_Bounded):
    """Any value between ``min`` and ``max``, each as likely."""

    kind: Literal["uniform"]
    max: float = Field(gt=0)

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return rng.uniform(self.min, self.max)

    @property
    def mean(self) -> float:
        """What draws are on average."""
        return (self.min + self.max) / 2


class Normal(_Bounded):
    """The bell curve."""

    kind: Literal["normal"]
    mean: float = Field(gt=0)
    stddev: float = Field(ge=0)

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return self._within(rng.gauss(self.mean, self.stddev))


class Lognormal(_Bounded):
    """Many short ones and a long tail, as lengths of real requests have."""

    kind: Literal["lognormal"]
    median: float = Field(gt=0)
    sigma: float = Field(ge=0, le=3, description="Standard deviation of the logarithm.")

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return self._within(rng.lognormvariate(math.log(self.median), self.sigma))

    @property
    def mean(self) -> float:
        """What draws are on average, before bounds."""
        return self.median * math.exp(self.sigma**2 / 2)


class Exponential(_Bounded):
    """Waiting times of people who do not coordinate."""

    kind: Literal["exponential"]
    mean: float = Field(gt=0)

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return self._within(rng.expovariate(1 / self.mean))


class Values(Section):
    """One of a list, each as likely: what a trace or a log has shown."""

    kind: Literal["values"]
    values: tuple[float, ...] = Field(min_length=1, strict=False)

    def draw(self, rng: random.Random) -> float:
        """One value."""
        return rng.choice(self.values)

    @property
    def mean(self) -> float:
        """What draws are on average."""
        return sum(self.values) / len(self.values)


def _bare_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"kind": "constant", "value": value}
    return value


Amount = Annotated[
    Constant | Uniform | Normal | Lognormal | Exponential | Values,
    Field(discriminator="kind"),
    BeforeValidator(_bare_number),
]


def constant(value: float) -> Constant:
    """The distribution that a bare number means."""
    return Constant(kind="constant", value=value)


def draw_count(amount: Amount, rng: random.Random) -> int:
    """A whole number, at least one."""
    return max(round(amount.draw(rng)), 1)
