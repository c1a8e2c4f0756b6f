"""The limits of keys are exact, whoever asks in whichever order, and whenever the server is started again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.cost.ledger import KeyUsage
from serving.gateway.identity import Identity
from serving.gateway.limits import Limits, Reservation, period_start
from serving.keys.key import Allowance
from serving.protocol.errors import ApiError

# 2026-11-24 02:00 UTC, a Tuesday.
NOW_UNIX = 1795485600.0
DAY_SECONDS = 24 * 3600


@dataclass
class Clock:
    """Time as a test wants it."""

    seconds: float = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def unix(self) -> float:
        return NOW_UNIX + self.seconds

    def limits(self) -> Limits:
        return Limits(self.monotonic, self.unix)


def who(**allowance: Any) -> Identity:
    return Identity(key_id="k", allowance=Allowance(**allowance))


def reserve(limits: Limits, identity: Identity, tokens: int = 1) -> Reservation:
    reservation = limits.reserve(identity, tokens)
    assert reservation is not None
    return reservation


def refusal(limits: Limits, identity: Identity, tokens: int = 1) -> ApiError:
    with pytest.raises(ApiError) as refused:
        limits.reserve(identity, tokens)
    return refused.value


def test_without_a_key_there_is_no_limit() -> None:
    assert Clock().limits().reserve(Identity(), 10**9) is None


def test_requests_per_minute_slide() -> None:
    clock = Clock()
    limits, key = clock.limits(), who(requests_per_minute=2)
    reserve(limits, key)
    clock.seconds = 20.5
    reserve(limits, key).settle(1, 0.0)
    error = refusal(limits, key)
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.retry_after_seconds == 40  # 39.5 s are left
    clock.seconds += 40
    reserve(limits, key)
    assert refusal(limits, key).retry_after_seconds == 21
    state, tokens = limits.states(key)
    assert tokens is None
    assert state is not None
    assert (state.limit, state.remaining, state.reset_seconds) == (2, 0, 60.0)


def test_tokens_are_reserved_then_settled() -> None:
    clock = Clock()
    limits, key = clock.limits(), who(tokens_per_minute=100)
    first = reserve(limits, key, 80)
    assert "20 left" in refusal(limits, key, 21).message
    first.settle(30, 0.0)
    first.settle(99, 0.0)  # told again, it changes nothing
    second = reserve(limits, key, 70)
    assert refusal(limits, key, 1).retry_after_seconds == 61
    second.withdraw()
    reserve(limits, key, 70)
    assert refusal(limits, key, 101).status == 400  # never


def test_requests_at_once() -> None:
    limits, key = Clock().limits(), who(max_concurrent=2)
    first, second = reserve(limits, key), reserve(limits, key, 0)
    assert refusal(limits, key).retry_after_seconds == 1
    first.settle(1, 0.0)
    reserve(limits, key)
    second.settle(0, 0.0)
    reserve(limits, key)
    refusal(limits, key)


def test_a_budget_of_tokens_and_its_end() -> None:
    clock = Clock()
    limits, key = clock.limits(), who(budget_tokens=100, budget_period="day")
    open_one = reserve(limits, key, 60)
    held = refusal(limits, key, 41)
    assert (held.code, held.retry_after_seconds) == ("rate_limit_exceeded", 1)
    open_one.settle(60, 0.0)
    spent = refusal(limits, key, 41)
    assert spent.code == "insufficient_quota"
    assert spent.retry_after_seconds == 22 * 3600 + 1
    assert spent.response.headers["x-should-retry"] == "false"
    late = reserve(limits, key, 40)
    clock.seconds += 22 * 3600
    late.settle(40, 0.0)  # counts for the day in which it came
    reserve(limits, key, 100).settle(100, 0.0)
    reserve(limits, key, 0)  # uses no tokens: nothing is spent
    refusal(limits, key, 1)


def test_a_budget_in_usd_ends_when_it_is_spent() -> None:
    clock = Clock()
    limits, key = clock.limits(), who(budget_usd=1.0)
    first, second = reserve(limits, key), reserve(limits, key)
    first.settle(5, 0.6)
    second.settle(5, 0.6)
    error = refusal(limits, key)
    assert error.code == "insufficient_quota"
    # November ends in 6 days and 22 hours.
    assert error.retry_after_seconds == 6 * DAY_SECONDS + 22 * 3600 + 1
    clock.seconds += error.retry_after_seconds
    reserve(limits, key)


def test_what_the_ledger_has_counts_again() -> None:
    clock = Clock()
    limits, key = clock.limits(), who(requests_per_minute=2, budget_tokens=100)
    recent = [KeyUsage("k", NOW_UNIX - 50, 30, 0.1), KeyUsage("k", NOW_UNIX - 10, 20, 0.1)]
    limits.restore([KeyUsage("k", NOW_UNIX - 50, 50, 0.2)], [KeyUsage("k", 0, 90, 0.2)], recent)
    assert refusal(limits, key).retry_after_seconds == 11
    clock.seconds = 11
    assert refusal(limits, key, 11).code == "insufficient_quota"
    reserve(limits, key, 10)


@pytest.mark.parametrize(
    ("now", "day", "month"),
    [
        (NOW_UNIX, NOW_UNIX - 2 * 3600, NOW_UNIX - 23 * DAY_SECONDS - 2 * 3600),
        (0.0, 0.0, 0.0),
        (31 * DAY_SECONDS - 1.0, 30 * DAY_SECONDS, 0.0),
        (31 * DAY_SECONDS, 31 * DAY_SECONDS, 31 * DAY_SECONDS),
    ],
)
def test_periods_are_those_of_utc(now: float, day: float, month: float) -> None:
    assert (period_start("day", now), period_start("month", now)) == (day, month)


@dataclass
class Seen:
    """A request that was let in: what an outsider knows of it."""

    arrived_at: float
    tokens: int
    reservation: Reservation
    is_open: bool = True
    usd: float = field(default=0.0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "end", "withdraw", "wait", "restart"]),
        st.integers(0, 100),
        st.floats(0, 70),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_no_order_of_events_exceeds_a_limit_or_wastes_it(
    steps: list[tuple[str, int, float]],
) -> None:
    """A model that knows all requests predicts each decision; what Retry-After says comes true."""
    clock, key = Clock(), who(
        requests_per_minute=5, tokens_per_minute=100, max_concurrent=3,
        budget_tokens=900, budget_period="day",
    )  # fmt: skip
    limits, seen = clock.limits(), list[Seen]()

    def fits(tokens: int, now: float) -> bool:
        window = [each for each in seen if each.arrived_at > now - 60]
        return (
            len(window) < 5
            and sum(each.tokens for each in window) + tokens <= 100
            and sum(each.is_open for each in seen) < 3
            and (not tokens or sum(each.tokens for each in seen) + tokens <= 900)
        )

    for what, number, seconds in steps:
        opened = [each for each in seen if each.is_open]
        if what == "wait":
            clock.seconds += seconds
        elif what == "restart":
            # What was under way is not in the ledger.
            seen[:] = [each for each in seen if not each.is_open]
            limits = clock.limits()
            usages = [KeyUsage("k", NOW_UNIX + each.arrived_at, each.tokens, 0.0) for each in seen]
            limits.restore(usages, usages, [u for u in usages if u.started_at > clock.unix() - 60])
        elif what == "ask":
            try:
                reservation = reserve(limits, key, number)
            except ApiError as error:
                assert not fits(number, clock.seconds)
                wait_seconds = error.retry_after_seconds
                assert wait_seconds is not None
                if "in a minute" in error.message:
                    # Not a second too long, either. Restarted, the clock that it is told by has lost a little of its precision.
                    ends_at = clock.seconds + wait_seconds
                    window_fits = [
                        sum(each.arrived_at > at - 60 for each in seen) < 5
                        and sum(each.tokens for each in seen if each.arrived_at > at - 60) + number
                        <= 100
                        for at in (ends_at + 1e-3, ends_at - 1 - 1e-3)
                    ]
                    assert window_fits == [True, False]
            else:
                assert fits(number, clock.seconds)
                seen.append(Seen(clock.seconds, number, reservation))
        elif opened:
            ended = opened[number % len(opened)]
            ended.is_open = False
            if what == "withdraw":
                ended.reservation.withdraw()
                seen.remove(ended)
            else:
                ended.tokens = math.floor(ended.tokens * seconds / 70)
                ended.reservation.settle(ended.tokens, 0.0)
