"""The gateway's memory for requests' bodies: what finds no room waits outside, before it is read.

A body is there from its first byte until it has been parsed, and what became of it until the request has been answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from serving.protocol.errors import ApiError

# Smaller bodies are no trouble: as many as wait in queues together are no larger than a few others.
_SMALL_BYTES = 64 * 1024
# Of what there is, for bodies that come in; the rest for those that came.
_INCOMING_SHARE = 0.25
# A text is there as it came, as Python's, and on its way to the engine; each part of a list or an object is a Python
# object with its place (a list takes the most, 64 bytes), and all but the first come after a comma.
_COPIES, _PART_BYTES = 3, 64
_LEAST_CAPACITY_BYTES = 64 * 2**20


class Room:
    """So many bytes, given to whoever asked first."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = self._free_bytes = capacity_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size_bytes: int) -> int:
        """Wait for room; returns what was taken: more than there is at all is all of it."""
        size_bytes = min(size_bytes, self._capacity_bytes)
        if not self._waiting and size_bytes <= self._free_bytes:
            self._free_bytes -= size_bytes
            return size_bytes
        turn = asyncio.get_running_loop().create_future()
        entry = (size_bytes, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(size_bytes)
            else:
                self._waiting.remove(entry)
                self._admit()
            raise
        return size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Have others take what :meth:`take` gave."""
        self._free_bytes += size_bytes
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free_bytes:
            size_bytes, turn = self._waiting.popleft()
            self._free_bytes -= size_bytes
            turn.set_result(None)


@dataclass(slots=True)
class Share:
    """What one request has of the room for bodies that came."""

    taken: list[tuple[Room, int]] = field(default_factory=list)

    def give_back(self) -> None:
        """All of it."""
        while self.taken:
            room, size_bytes = self.taken.pop()
            room.give_back(size_bytes)


class BodyRoom:
    """Room for all bodies of a server, ``capacity_bytes`` of memory (64 MiB at least)."""

    def __init__(self, capacity_bytes: int, wait_seconds: float) -> None:
        """A request that has waited ``wait_seconds`` is turned away."""
        capacity_bytes = max(capacity_bytes, _LEAST_CAPACITY_BYTES)
        incoming_bytes = int(_INCOMING_SHARE * capacity_bytes)
        self._incoming = Room(incoming_bytes)
        self._there = Room(capacity_bytes - incoming_bytes)
        self.wait_seconds = wait_seconds

    @asynccontextmanager
    async def incoming(self, size_bytes: int) -> AsyncIterator[None]:
        """Room for a body to come in; raises :class:`ApiError` (503) when there is none in time."""
        if size_bytes <= _SMALL_BYTES:
            yield
            return
        taken_bytes = await self._wait(self._incoming, size_bytes)
        try:
            yield
        finally:
            self._incoming.give_back(taken_bytes)

    async def keep(self, body: bytes, share: Share) -> None:
        """Room for what will be made of a body, for the request that has ``share``; raises :class:`ApiError` (503)."""
        if len(body) > _SMALL_BYTES:
            size_bytes = _COPIES * len(body) + _PART_BYTES * body.count(b",")
            share.taken.append((self._there, await self._wait(self._there, size_bytes)))

    async def _wait(self, room: Room, size_bytes: int) -> int:
        try:
            async with asyncio.timeout(self.wait_seconds):
                return await room.take(size_bytes)
        except TimeoutError:
            raise ApiError(
                503,
                "There is no memory for one more request of this size beside those that are being answered; "
                "try again in a moment (half of memory.reserve_mib is for them).",
                code="too_many_large_requests",
                retry_after_seconds=5,
            ) from None


class BodyRoomMiddleware:
    """Gives each request its share, and takes it back once it has been answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        share = scope.setdefault("state", {})["body_share"] = Share()
        try:
            await self._app(scope, receive, send)
        finally:
            share.give_back()
