"""A circuit breaker: whether a server that has failed is asked again, and when."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from enum import Enum

_log = logging.getLogger(__name__)

_CONSECUTIVE_FAILURES = 5
# Or this share of the last calls, once there are enough of them.
_FAILURE_RATE = 0.5
_CALLS_REMEMBERED = 20
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0


class BreakerState(Enum):
    """CLOSED: all calls go. OPEN: none does. HALF_OPEN: one goes, as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


# It opens after failures. After a pause, and a probe that went well, it is half open: the next trial decides.
LEGAL_MOVES = {
    BreakerState.CLOSED: frozenset((BreakerState.OPEN,)),
    BreakerState.OPEN: frozenset((BreakerState.HALF_OPEN,)),
    BreakerState.HALF_OPEN: frozenset((BreakerState.CLOSED, BreakerState.OPEN)),
}


class Passage:
    """A call that the breaker let through. The first word on how it went counts."""

    __slots__ = ("_breaker", "_is_open", "_is_trial", "_number")

    def __init__(self, breaker: Breaker, number: int, *, is_trial: bool) -> None:
        self._breaker = breaker
        self._number = number
        self._is_trial = is_trial
        self._is_open = True

    def succeeded(self) -> None:
        """The server works. It may still fail later in the call: then say :meth:`failed` after all."""
        self._settle(failed=False)

    def failed(self) -> None:
        """The server does not work."""
        self._is_open = True
        self._settle(failed=True)

    def withdraw(self) -> None:
        """Nothing was learnt: the call did not take place, or its caller has left. No more after an outcome."""
        self._settle(failed=None)

    def _settle(self, *, failed: bool | None) -> None:
        if self._is_open:
            self._is_open = False
            is_trial, self._is_trial = self._is_trial, False
            self._breaker._settled(self._number, failed, is_trial=is_trial)


class Breaker:
    """The breaker of one server, named in the log. In one thread; moments are ``time.monotonic()``."""

    def __init__(self, name: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.state = BreakerState.CLOSED
        self._name = name
        self._monotonic = monotonic
        # Whether each of the last calls failed.
        self._outcomes: deque[bool] = deque(maxlen=_CALLS_REMEMBERED)
        self._consecutive_failures = 0
        self._trial_is_out = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._probe_at = -math.inf
        # Of the state: what was sent in an earlier one says nothing about this one.
        self._number = 0

    @property
    def lets_through(self) -> bool:
        """Whether a call would be let through now."""
        if self.state is BreakerState.HALF_OPEN:
            return not self._trial_is_out
        return self.state is BreakerState.CLOSED

    @property
    def seconds_until_probe(self) -> float:
        """When it is to be found out whether the server works again; 0 if now, infinite if it is not open."""
        if self.state is not BreakerState.OPEN:
            return math.inf
        return max(0.0, self._probe_at - self._monotonic())

    def enter(self) -> Passage | None:
        """Let a call through; None if it may not. How it went must be told."""
        if not self.lets_through:
            return None
        is_trial = self.state is BreakerState.HALF_OPEN
        self._trial_is_out |= is_trial
        return Passage(self, self._number, is_trial=is_trial)

    def probed(self, *, works: bool) -> None:
        """A probe was made, beside the calls."""
        if self.state is BreakerState.OPEN:
            if works:
                self._move(BreakerState.HALF_OPEN)
            else:
                self._pause()
        elif self.state is BreakerState.CLOSED and not works:
            self._settled(self._number, failed=True, is_trial=False)

    def _settled(self, number: int, failed: bool | None, *, is_trial: bool) -> None:
        if number != self._number:
            return
        if is_trial:
            self._trial_is_out = False
        if failed is None:
            return
        if self.state is BreakerState.HALF_OPEN:
            self._move(BreakerState.OPEN if failed else BreakerState.CLOSED)
            return
        self._outcomes.append(failed)
        self._consecutive_failures = self._consecutive_failures + 1 if failed else 0
        is_full = len(self._outcomes) == _CALLS_REMEMBERED
        rate = sum(self._outcomes) / _CALLS_REMEMBERED
        if self._consecutive_failures >= _CONSECUTIVE_FAILURES or (
            failed and is_full and rate >= _FAILURE_RATE
        ):
            self._move(BreakerState.OPEN)

    def _move(self, state: BreakerState) -> None:
        assert state in LEGAL_MOVES[self.state], f"{self.state} → {state}"
        self.state = state
        self._number += 1
        self._trial_is_out = False
        self._outcomes.clear()
        self._consecutive_failures = 0
        if state is BreakerState.OPEN:
            self._pause()
        elif state is BreakerState.CLOSED:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        level = logging.WARNING if state is BreakerState.OPEN else logging.INFO
        _log.log(level, "%s: its circuit breaker is %s", self._name, state.value.replace("_", " "))

    def _pause(self) -> None:
        """Wait before the next probe, each time longer."""
        self._probe_at = self._monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
