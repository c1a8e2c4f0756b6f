"""What each API key may still use: requests and tokens per minute, requests at once, budgets.

A minute is a sliding window: of the requests that came in any 60 seconds, never more than the limit, nor
with more tokens than the limit, go to an engine. A request counts in the window and in the budget of the
moment in which it came. Before it goes, an upper bound of its tokens is reserved; when it ends, what it
used takes the place of that. So nothing that is under way at once can together exceed a limit on tokens.
What a request costs is known only when it has ended: a budget in USD turns requests away once it is spent,
and can be exceeded by what is under way then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from serving.cost.ledger import KeyUsage
from serving.gateway.identity import Identity
from serving.keys.key import Allowance
from serving.protocol.errors import ApiError
from serving.protocol.keys import BudgetPeriod

WINDOW_SECONDS = 60.0
_SLOT_RETRY_SECONDS = 1
PERIODS: tuple[BudgetPeriod, ...] = ("day", "month")


@dataclass(frozen=True, slots=True)
class WindowState:
    """How much of a limit per minute is left, and in how many seconds all of it will be."""

    limit: int
    remaining: int
    reset_seconds: float


@dataclass(slots=True)
class _Spent:
    """What was used in a period, and what is reserved for requests under way."""

    ends_unix: float
    tokens: int = 0
    reserved_tokens: int = 0
    usd: float = 0.0


@dataclass(slots=True, eq=False)
class _Account:
    """What a key has used. ``window`` holds the requests of the last minute, in the order they came."""

    window: deque[Reservation] = field(default_factory=deque)
    window_tokens: int = 0
    concurrent: int = 0
    spent: dict[BudgetPeriod, _Spent] = field(default_factory=dict)


class Reservation:
    """A request's place in its key's limits, from when it came until it has ended."""

    __slots__ = ("_account", "_in_window", "_is_open", "_spent", "arrived_at", "tokens")

    def __init__(
        self, account: _Account, arrived_at: float, tokens: int, spent: Iterable[_Spent]
    ) -> None:
        self.arrived_at = arrived_at
        self.tokens = tokens
        self._account = account
        self._spent = tuple(spent)
        self._in_window = self._is_open = True
        # What others have served comes late.
        position = len(account.window)
        while position and account.window[position - 1].arrived_at > arrived_at:
            position -= 1
        account.window.insert(position, self)
        account.window_tokens += tokens
        account.concurrent += 1
        for each in self._spent:
            each.reserved_tokens += tokens

    def settle(self, tokens: int, usd: float) -> None:
        """The request has ended and used this, instead of what was reserved. Told again, it changes nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._account.concurrent -= 1
        for each in self._spent:
            each.reserved_tokens -= self.tokens
            each.tokens += tokens
            each.usd += usd
        if self._in_window:
            self._account.window_tokens += tokens - self.tokens
        self.tokens = tokens

    def withdraw(self) -> None:
        """The request went to no engine: it does not count at all."""
        if self._is_open and self._in_window:
            self._account.window.remove(self)
            self._account.window_tokens -= self.tokens
            self._in_window = False
        self.settle(0, 0.0)

    def leave_window(self) -> None:
        """A minute has passed since it came."""
        self._in_window = False
        self._account.window_tokens -= self.tokens


class Limits:
    """Counts what each key uses in this process, and turns away what would be too much.

    All in one thread: between the look and the reservation nobody else gets in.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
    ) -> None:
        self._monotonic = monotonic
        self._unix = unix
        self._accounts: dict[str, _Account] = {}

    def restore(
        self,
        of_day: Iterable[KeyUsage],
        of_month: Iterable[KeyUsage],
        recent: Iterable[KeyUsage],
    ) -> None:
        """Begin with what the ledger has: sums by key since :func:`period_start`, and the last minute's requests."""
        periods: tuple[tuple[BudgetPeriod, Iterable[KeyUsage]], ...]
        periods = (("day", of_day), ("month", of_month))
        for period, usages in periods:
            for usage in usages:
                spent = self._spent(self._account(usage.key_id), period)
                spent.tokens += usage.tokens
                spent.usd += usage.usd
        now, now_unix = self._monotonic(), self._unix()
        for usage in recent:
            account = self._account(usage.key_id)
            age_seconds = max(0.0, now_unix - usage.started_at)
            Reservation(account, now - age_seconds, usage.tokens, ()).settle(usage.tokens, 0.0)

    def add(self, usage: KeyUsage) -> None:
        """Count a request, too, that another server has served."""
        account, now_unix = self._pruned(usage.key_id), self._unix()
        spent = [
            self._spent(account, period)
            for period in PERIODS
            if usage.started_at >= period_start(period, now_unix)
        ]
        arrived_at = self._monotonic() - max(0.0, now_unix - usage.started_at)
        Reservation(account, arrived_at, usage.tokens, spent).settle(usage.tokens, usage.usd)

    def reserve(self, identity: Identity, tokens: int) -> Reservation | None:
        """Let a request in that uses ``tokens`` at most; None where there is no key to count for.

        ``tokens`` 0 is a request that generates nothing: budgets do not concern it. Raises
        :class:`ApiError`: 429 with the time after which it would be let in, 400 if it never would.
        """
        if identity.key_id is None:
            return None
        allowance = identity.allowance
        account = self._pruned(identity.key_id)
        spent = {period: self._spent(account, period) for period in PERIODS}
        _refuse_the_impossible(allowance, tokens)
        if tokens:
            self._check_budget(allowance, spent[allowance.budget_period], tokens)
        if allowance.max_concurrent is not None and account.concurrent >= allowance.max_concurrent:
            raise _limited(
                f"{account.concurrent} requests are under way with this API key, which may have "
                f"{allowance.max_concurrent}.",
                _SLOT_RETRY_SECONDS,
            )
        self._check_window(allowance, account, tokens)
        return Reservation(account, self._monotonic(), tokens, spent.values())

    def states(self, identity: Identity) -> tuple[WindowState | None, WindowState | None]:
        """How a key stands with its requests and its tokens per minute; None where it has no such limit."""
        allowance = identity.allowance
        limits = (allowance.requests_per_minute, allowance.tokens_per_minute)
        if identity.key_id is None or limits == (None, None):
            return None, None
        account = self._pruned(identity.key_id)
        last = account.window[-1].arrived_at if account.window else float("-inf")
        reset_seconds = max(0.0, last + WINDOW_SECONDS - self._monotonic())
        used = (len(account.window), account.window_tokens)
        requests, tokens = (
            None if limit is None else WindowState(limit, max(0, limit - count), reset_seconds)
            for limit, count in zip(limits, used, strict=True)
        )
        return requests, tokens

    def _check_budget(self, allowance: Allowance, spent: _Spent, tokens: int) -> None:
        period, limit = allowance.budget_period, allowance.budget_tokens
        if allowance.budget_usd is not None and spent.usd >= allowance.budget_usd:
            what = f"its {allowance.budget_usd:g} USD of this {period} are spent"
        elif limit is not None and spent.tokens + tokens > limit:
            what = (
                f"of its {limit} tokens of this {period} {max(0, limit - spent.tokens)} are left, "
                f"and this request may use {tokens}; a lower max_tokens may do"
            )
        elif limit is not None and spent.tokens + spent.reserved_tokens + tokens > limit:
            raise _limited(
                f"what is left of this API key's {limit} tokens of this {period} is held for its "
                f"requests under way; this one may use {tokens}.",
                _SLOT_RETRY_SECONDS,
            )
        else:
            return
        raise ApiError(
            429,
            f"The budget of this API key does not allow it: {what}.",
            code="insufficient_quota",
            retry_after_seconds=int(spent.ends_unix - self._unix()) + 1,
        )

    def _check_window(self, allowance: Allowance, account: _Account, tokens: int) -> None:
        now, waits = self._monotonic(), list[tuple[float, str]]()
        limit = allowance.requests_per_minute
        if limit is not None and len(account.window) >= limit:
            leaver = account.window[len(account.window) - limit]
            waits.append((leaver.arrived_at, f"{limit} requests"))
        limit = allowance.tokens_per_minute
        if limit is not None and (excess := account.window_tokens + tokens - limit) > 0:
            for leaver in account.window:
                excess -= leaver.tokens
                if excess <= 0:
                    break
            told = f"{limit} tokens, of which it has {max(0, limit - account.window_tokens)} left"
            waits.append((leaver.arrived_at, f"{told}; this request may use {tokens}"))
        if waits:
            arrived_at, what = max(waits)
            wait_seconds = int(arrived_at + WINDOW_SECONDS - now) + 1
            raise _limited(f"This API key may have, in a minute, {what}.", wait_seconds)

    def _account(self, key_id: str) -> _Account:
        return self._accounts.setdefault(key_id, _Account())

    def _pruned(self, key_id: str) -> _Account:
        """A key's account without what is older than a minute."""
        account = self._account(key_id)
        horizon = self._monotonic() - WINDOW_SECONDS
        while account.window and account.window[0].arrived_at <= horizon:
            account.window.popleft().leave_window()
        return account

    def _spent(self, account: _Account, period: BudgetPeriod) -> _Spent:
        """What is spent in the current period; requests of an earlier one still settle there."""
        spent = account.spent.get(period)
        now_unix = self._unix()
        if spent is None or now_unix >= spent.ends_unix:
            spent = account.spent[period] = _Spent(next_start(period, now_unix))
        return spent


def period_start(period: BudgetPeriod, now_unix: float) -> float:
    """When the current day or month began, in Unix time; both are UTC's."""
    midnight = datetime.fromtimestamp(now_unix, UTC).replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    return (midnight if period == "day" else midnight.replace(day=1)).timestamp()


def next_start(period: BudgetPeriod, now_unix: float) -> float:
    """When the next day or month begins, as :func:`period_start` has them."""
    start = datetime.fromtimestamp(period_start(period, now_unix), UTC)
    if period == "day":
        return (start + timedelta(days=1)).timestamp()
    # The 32nd of any month is in the next.
    return period_start("month", (start + timedelta(days=31)).timestamp())


def _refuse_the_impossible(allowance: Allowance, tokens: int) -> None:
    """Raise :class:`ApiError` (400) for a request that would not be let in however long it waited."""
    for name in ("tokens_per_minute", "budget_tokens"):
        limit = getattr(allowance, name)
        if limit is not None and tokens > limit:
            raise ApiError(
                400,
                f"This request may use {tokens} tokens, prompt and completion together, but its API "
                f"key's {name} is {limit}; lower max_tokens or shorten the prompt.",
                code="request_exceeds_limit",
            )


def _limited(message: str, retry_after_seconds: int) -> ApiError:
    return ApiError(
        429,
        f"Rate limit reached: {message}",
        code="rate_limit_exceeded",
        retry_after_seconds=retry_after_seconds,
    )
