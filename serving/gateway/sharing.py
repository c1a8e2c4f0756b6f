"""How much of an engine's time a request has, for engines that do not say; and how much of the rig's its engine."""

from __future__ import annotations

import time
from collections import Counter


class SharedTime:
    """The time of one engine: while several requests are there, each has an equal share of it.

    So the shares of all add up to the time in which the engine had any.
    """

    def __init__(self) -> None:
        self._there = 0
        # What a request would have had that was there from the beginning on.
        self._given_seconds = 0.0
        self._since = time.monotonic()

    def enter(self) -> float:
        """A request comes; gives what :meth:`leave` is to be told."""
        self._pass()
        self._there += 1
        return self._given_seconds

    def leave(self, entered: float) -> float:
        """A request goes; gives its share, in seconds."""
        self._pass()
        self._there -= 1
        return self._given_seconds - entered

    def _pass(self) -> None:
        now = time.monotonic()
        if self._there:
            self._given_seconds += (now - self._since) / self._there
        self._since = now


class SharedRig:
    """The time of the whole rig: while several models have requests, each has an equal share of it.

    So what is charged to requests of all models never adds up to more than the time on the clock.
    """

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()
        # What a model would have had that was busy from the beginning on.
        self._given_seconds = 0.0
        self._since = time.monotonic()

    def enter(self, model: str) -> tuple[float, float]:
        """A request of a model comes; gives what :meth:`leave` is to be told."""
        self._pass()
        self._requests[model] += 1
        return self._since, self._given_seconds

    def leave(self, model: str, entered: tuple[float, float]) -> float:
        """A request goes; gives its model's mean share of the rig meanwhile, above 0, at most 1."""
        self._pass()
        self._requests[model] -= 1
        if not self._requests[model]:
            del self._requests[model]
        since, given_seconds = entered
        if self._since == since:
            return 1.0
        return (self._given_seconds - given_seconds) / (self._since - since)

    def _pass(self) -> None:
        now = time.monotonic()
        if self._requests:
            self._given_seconds += (now - self._since) / len(self._requests)
        self._since = now
