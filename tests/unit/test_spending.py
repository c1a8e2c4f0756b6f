"""Budgets of commercial models: nothing that is under way together exceeds them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.config import RemoteModel
from serving.cost.prices import UnknownModel
from serving.gateway.spending import Purchase, Spending, prices_of
from serving.protocol.errors import ApiError
from serving.protocol.responses import Usage

# 2026-11-24 02:00 UTC.
NOW_UNIX = 1795485600.0
DAY_SECONDS = 24 * 3600


def a_model(**options: Any) -> RemoteModel:
    price = {} if "price_of" in options else {"usd_per_million": {"input": 1.0, "output": 2.0}}
    return RemoteModel.model_validate(
        {
            "name": "m",
            "engine": "remote",
            "base_url": "https://api.example/v1",
            "budget_usd": 1.0,
            **price,
            **options,
        }
    )


class Till:
    """A budget, and a clock to move."""

    def __init__(self, **options: Any) -> None:
        self.model = a_model(**options)
        self.now_unix = NOW_UNIX
        self.spending = Spending(prices_of([self.model]), lambda: self.now_unix)

    def buy(self, prompt: int, completion: int = 0) -> Purchase:
        purchase = self.spending.reserve(self.model, prompt, completion)
        assert purchase is not None
        return purchase

    def refusal(self, prompt: int) -> ApiError:
        with pytest.raises(ApiError) as refused:
            self.buy(prompt)
        assert (refused.value.status, refused.value.code) == (503, "budget_exhausted")
        return refused.value


def test_a_bound_is_held_back_and_what_it_did_cost_takes_its_place() -> None:
    till = Till()
    first = till.buy(600_000)
    assert "held for requests under way" in till.refusal(600_000).message
    usage = Usage(100_000, 0, 50_000)
    assert first.usd(usage) == pytest.approx(0.2)
    first.settle(first.usd(usage))
    first.settle(99.0)
    assert till.spending.spent_usd("m", "month") == pytest.approx(0.2)
    till.buy(600_000).settle(0.0)
    refusal = till.refusal(900_000)
    assert "of its 1 USD of this month 0.8 are left" in refusal.message
    assert refusal.retry_after_seconds == pytest.approx(6 * DAY_SECONDS + 22 * 3600, abs=2)


def test_cached_tokens_have_a_price_of_their_own_and_no_usage_is_the_bound() -> None:
    till = Till(usd_per_million={"input": 1.0, "cached_input": 0.1, "output": 2.0})
    purchase = till.buy(1000, 1000)
    assert purchase.usd(Usage(1000, 500, 10)) == pytest.approx(0.00057)
    assert purchase.usd(None) == purchase.bound_usd == pytest.approx(0.003)


def test_a_day_ends_and_what_was_spent_before_a_restart_is_spent() -> None:
    till = Till(budget_period="day")
    till.spending.restore("day", {"m": 1.0, "other": 5.0})
    till.spending.restore("month", {"m": 9.0})
    assert "its 1 USD of this day are spent" in till.refusal(1).message
    late = till.now_unix = NOW_UNIX + DAY_SECONDS
    till.buy(1000).settle(0.5)
    assert till.spending.spent_usd("m", "day") == 0.5
    assert till.spending.spent_usd("m", "month") == 9.5
    assert late > NOW_UNIX


def test_what_costs_nothing_has_no_budget() -> None:
    free = RemoteModel(name="f", engine="remote", base_url="http://rig.example/v1")
    assert Spending(prices_of([free])).reserve(free, 10**9, 10**9) is None


def test_prices_of_the_price_book_and_of_nowhere() -> None:
    (price,) = prices_of([a_model(price_of="openai/gpt-4o-mini")]).values()
    assert price(1_000_000, 0, 0) == pytest.approx(0.15)
    assert price(0, 0, 1_000_000) == pytest.approx(0.6)
    with pytest.raises(UnknownModel, match="m: price_of: 'openai/gpt-nope'"):
        prices_of([a_model(price_of="openai/gpt-nope")])


def test_requests_that_wait_for_a_model_that_is_gone_have_its_price() -> None:
    till = Till()
    till.spending.configure({})
    assert till.buy(1000).bound_usd == pytest.approx(0.001)
    till.spending.configure(prices_of([a_model(usd_per_million={"input": 2.0, "output": 2.0})]))
    assert till.buy(1000).bound_usd == pytest.approx(0.002)


@given(st.lists(st.tuples(st.integers(1, 400_000), st.floats(0, 1), st.booleans())))
def test_together_they_never_exceed_it(requests: list[tuple[int, float, bool]]) -> None:
    till = Till()
    under_way: list[tuple[Purchase, float]] = []
    for tokens, share, ends in requests:
        try:
            purchase = till.buy(tokens)
        except ApiError:
            pass
        else:
            under_way.append((purchase, share * purchase.bound_usd))
        worst = till.spending.spent_usd("m", "month") + sum(p.bound_usd for p, _ in under_way)
        assert worst <= 1.0 or math.isclose(worst, 1.0)
        if ends and under_way:
            purchase, usd = under_way.pop(0)
            purchase.settle(usd)
