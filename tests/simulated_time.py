"""Time that passes when there is nothing left to do: waiting takes none, and a busy machine changes nothing."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

_LONGEST_SECONDS = 3600.0


def simulate(test: Coroutine[Any, Any, None]) -> None:
    """Run ``test`` in an event loop whose clock begins at 0 and stands still while anybody has work."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        runner.run(asyncio.wait_for(test, _LONGEST_SECONDS))


class _Selector(selectors.DefaultSelector):
    now_seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self.now_seconds += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_seconds
