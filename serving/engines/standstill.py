"""Notices that an engine computes nothing any more although its API answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

_LOOK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Pulse:
    """How it shows that an engine computes.

    What it tells at ``path``, as far as ``steps_of`` takes it from there (nothing: it does not tell), changes with each
    of its steps. ``trial`` is a request that takes one: its path, and its body.
    """

    path: str
    steps_of: Callable[[bytes], bytes]
    trial: tuple[str, Mapping[str, Any]]


class Standstill:
    """Watches one process. An engine with requests need not compute: their clients may read slowly, so it is tried."""

    def __init__(
        self,
        pulse: Pulse,
        session: aiohttp.ClientSession,
        base_url: str,
        api_key: str,
    ) -> None:
        self._pulse = pulse
        self._session = session
        self._base_url = base_url
        self._headers = {"authorization": f"Bearer {api_key}"}
        self._steps: bytes | None = None
        self._since: float | None = None
        self._trying: asyncio.Task[None] | None = None

    async def seconds(self, *, has_work: bool) -> float:
        """For how long it has computed nothing, not even what it was tried with; 0 if it has no work."""
        steps = await self._steps_now() if has_work else None
        if steps is None or steps != self._steps or (self._trying and self._trying.done()):
            self._steps = steps
            self.rest()
        elif self._trying is None:
            self._since = time.monotonic()
            self._trying = asyncio.create_task(self._try())
        return 0.0 if self._since is None else time.monotonic() - self._since

    def rest(self) -> None:
        """Try no more, until :meth:`seconds` is asked again."""
        if self._trying is not None:
            self._trying.cancel()
        self._trying = self._since = None

    async def _steps_now(self) -> bytes | None:
        """What changes with each step; None while that cannot be had."""
        url, timeout = self._base_url + self._pulse.path, aiohttp.ClientTimeout(total=_LOOK_SECONDS)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.get(url, headers=self._headers, timeout=timeout) as answer:
                return self._pulse.steps_of(await answer.read()) or None
        return None

    async def _try(self) -> None:
        path, body = self._pulse.trial
        # Whatever comes of it: it came.
        with contextlib.suppress(aiohttp.ClientError):
            async with self._session.post(
                self._base_url + path, json=body, headers=self._headers
            ) as answer:
                await answer.read()
