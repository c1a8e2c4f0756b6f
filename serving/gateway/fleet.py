"""What the gateway's policy of swapping needs of the engines' supervisor, and what it tells in return.

Note between the two sides: ``serving.engines.supervisor.Supervisor`` is a Fleet. Loads are shared, so that
none is double; a plan and its reservation are one step, so that no two loads count on the same room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from serving.engines.placement import Plan
from serving.engines.supervisor import Engine
from serving.gateway.routing import Backend


class Fleet(Protocol):
    """Loads and unloads engines when told to."""

    @property
    def engines(self) -> Sequence[Engine]:
        """One for each model of the config now; a reload changes them."""

    async def load(self, engine: Engine, may_leave: Callable[[Engine], bool] = ...) -> None:
        """Have an engine ready; those for whom ``may_leave`` holds are unloaded if their room is needed.

        ``may_leave`` is asked, and those who leave stop taking requests, without a wait in between. Raises
        ``EngineStartError``, with the process's last lines, and its kind ``NoRoomError``, at once, if there
        is no place now (``is_final``: ever): then nobody has left. Try again after a change.
        """

    async def unload(self, engine: Engine) -> None:
        """Have an engine's process ended and its memory free. Requests in flight break off."""

    def plan(self, engine: Engine, may_leave: Callable[[Engine], bool] = ...) -> Plan | None:
        """Where an engine whose footprint is known would go now and who would leave; None: no place now."""

    async def measure(self) -> None:
        """See what memory the engines hold."""

    def subscribe(self, listener: Callable[[Engine], None]) -> None:
        """Call ``listener`` after each change of an engine's state."""

    def traffic(
        self, last_used: Callable[[Engine], float], in_flight: Callable[[Engine], int]
    ) -> None:
        """Have ``last_used`` (``time.monotonic()``) asked when it is to be decided who makes room, ``in_flight`` who is stuck."""


class Traffic(Protocol):
    """Which requests an engine has: what `models ps` shows, and who may leave."""

    def in_flight(self, engine: Backend) -> int:
        """Requests that the engine works on, and those about to be sent."""

    def waiting(self, engine: Backend) -> int:
        """Requests that wait in the gateway for the engine."""

    def requests_with(self, engine: Backend, adapter: str) -> int:
        """Requests for an adapter of the engine's: in flight or waiting."""

    def oldest_with(self, engine: Backend, adapter: str) -> float:
        """When the oldest of an adapter's requests in flight was let through (``time.monotonic()``); infinity if none is."""

    def last_used(self, engine: Backend) -> float:
        """When it last had a request (``time.monotonic()``); 0 if never."""
