"""How much of an engine's time a request has, for engines that do not say."""

from __future__ import annotations

import time


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
