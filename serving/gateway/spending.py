"""What models of commercial APIs cost, and may cost: each has a budget for a day or a month.

Before a request goes there, the most that it can cost is held back from the budget; when it has ended, what
it did cost takes the place of that. So all that is under way together never exceeds a budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from serving.config import RemoteModel, UsdPerMillion
from serving.cost.price_data import PriceData
from serving.cost.prices import PriceBook
from serving.gateway.limits import PERIODS, next_start, period_start
from serving.protocol.errors import ApiError
from serving.protocol.keys import BudgetPeriod
from serving.protocol.responses import Usage

# USD for tokens of the prompt, those of them that were cached, and generated ones.
Price = Callable[[int, int, int], float]

_RETRY_SECONDS = 1


def prices_of(models: Iterable[RemoteModel], data: PriceData | None = None) -> dict[str, Price]:
    """The prices of those models that cost money, by name; ``data`` None is genai-prices' own. Raises ``UnknownModel``."""
    return {model.name: _price_of(model, data) for model in models if model.costs_money}


@dataclass(slots=True)
class _Spent:
    """What was spent in a period, and what is held back for requests under way."""

    ends_unix: float
    usd: float = 0.0
    reserved_usd: float = 0.0


class Purchase:
    """A request's part of its model's budget, until it has ended."""

    __slots__ = ("_is_open", "_price", "_spent", "bound_usd")

    def __init__(self, price: Price, spent: tuple[_Spent, ...], bound_usd: float) -> None:
        self.bound_usd = bound_usd
        self._price = price
        self._spent = spent
        self._is_open = True
        for each in spent:
            each.reserved_usd += bound_usd

    def usd(self, usage: Usage | None) -> float:
        """What the request cost. Where its usage was not told, the most that it can have cost."""
        if usage is None:
            return self.bound_usd
        return self._price(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)

    def settle(self, usd: float) -> None:
        """The request has ended and cost this. Told again, it changes nothing."""
        if not self._is_open:
            return
        self._is_open = False
        for each in self._spent:
            each.reserved_usd -= self.bound_usd
            each.usd += usd


class Spending:
    """The budgets of commercial models. In one thread: between the look and the reservation nobody gets in."""

    def __init__(
        self, prices: Mapping[str, Price] | None = None, unix: Callable[[], float] = time.time
    ) -> None:
        self._prices: Mapping[str, Price] = prices or {}
        self._unix = unix
        self._spent: dict[tuple[str, BudgetPeriod], _Spent] = {}

    def configure(self, prices: Mapping[str, Price]) -> None:
        """Use other prices from the next request on; what was spent stays spent.

        Models that are gone keep theirs, for requests that wait for them still.
        """
        self._prices = {**self._prices, **prices}

    def restore(self, period: BudgetPeriod, usd_by_model: Mapping[str, float]) -> None:
        """Begin with what the ledger has of the current period."""
        for name, usd in usd_by_model.items():
            self._of(name, period).usd += usd

    def add(self, name: str, started_unix: float, usd: float) -> None:
        """Count a request, too, that another server has sent."""
        for period in PERIODS:
            if started_unix >= period_start(period, self._unix()):
                self._of(name, period).usd += usd

    def spent_usd(self, name: str, period: BudgetPeriod) -> float:
        """What a model has cost in the current period, without what is under way."""
        return self._of(name, period).usd

    def reserve(
        self, model: RemoteModel, prompt_tokens: int, completion_tokens: int
    ) -> Purchase | None:
        """Let a request through that has so many tokens at most; None if the model costs nothing.

        Raises :class:`ApiError` (503) if its budget does not allow it.
        """
        if not model.costs_money:
            return None
        assert model.budget_usd is not None
        price = self._prices[model.name]
        bound_usd = price(prompt_tokens, 0, completion_tokens)
        current = self._of(model.name, model.budget_period)
        left_usd = model.budget_usd - current.usd
        if bound_usd > left_usd - current.reserved_usd:
            raise self._refusal(model, bound_usd, left_usd, current)
        # Both are kept up to date: a reload may change the period.
        both = (self._of(model.name, "day"), self._of(model.name, "month"))
        return Purchase(price, both, bound_usd)

    def _refusal(
        self, model: RemoteModel, bound_usd: float, left_usd: float, current: _Spent
    ) -> ApiError:
        total = f"{model.budget_usd:g} USD of this {model.budget_period}"
        seconds = int(current.ends_unix - self._unix()) + 1
        if bound_usd <= left_usd:
            what = f"what is left of its {total} is held for requests under way"
            seconds = _RETRY_SECONDS
        elif left_usd <= 0:
            what = f"its {total} are spent"
        else:
            what = (
                f"of its {total} {left_usd:.6g} are left, and this request may cost "
                f"{bound_usd:.6g}; a lower max_tokens may do"
            )
        return ApiError(
            503,
            f"The budget of the model '{model.name}' does not allow it: {what}.",
            code="budget_exhausted",
            retry_after_seconds=seconds,
        )

    def _of(self, name: str, period: BudgetPeriod) -> _Spent:
        """What is spent in the current period; requests of an earlier one still settle there."""
        spent = self._spent.get((name, period))
        now_unix = self._unix()
        if spent is None or now_unix >= spent.ends_unix:
            spent = self._spent[name, period] = _Spent(next_start(period, now_unix))
        return spent


def _price_of(model: RemoteModel, data: PriceData | None) -> Price:
    if model.usd_per_million is not None:
        return _flat(model.usd_per_million)
    assert model.price_of is not None
    reference = model.price_of
    book = PriceBook((reference,), key=f"{model.name}: price_of", data=data)
    return lambda prompt, cached, completion: book.usd(reference, prompt, cached, completion)


def _flat(rates: UsdPerMillion) -> Price:
    cached_rate = rates.input if rates.cached_input is None else rates.cached_input

    def price(prompt: int, cached: int, completion: int) -> float:
        fresh_usd = (prompt - cached) * rates.input
        return (fresh_usd + cached * cached_rate + completion * rates.output) / 1e6

    return price
