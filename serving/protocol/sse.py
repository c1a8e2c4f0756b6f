"""Server-sent events: how a stream is written, and how it notices that its reader has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
# nginx's status for clients that have left before the answer.
CLIENT_CLOSED_REQUEST = 499


def event(payload: dict[str, Any]) -> bytes:
    """One event that carries ``payload`` as JSON."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class EventStream(Response):
    """Sends the byte chunks of an async generator as they come, until the client hangs up.

    ``on_close`` is called exactly once, however the response ends: the place to cancel what is left of
    the work behind the stream.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        on_close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            headers={"x-accel-buffering": "no", **(headers or {})},
            media_type="text/event-stream",
        )
        # Response counts its (empty) body; a stream's length is not known.
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientDisconnected:
            pass
        finally:
            try:
                await self._chunks.aclose()
            finally:
                self._on_close()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientDisconnected(Exception):
    """The client hung up before its response was complete."""


async def respond_to_nobody(_request: Request, _error: Exception) -> Response:
    """Starlette exception handler for clients that have left; the status is for logs only."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do ``work`` unless the client hangs up first: then cancel it, raise :class:`ClientDisconnected`.

    The request's body must have been read.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnected
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
