"""One request on its way to an engine whose words are not ours: what it says comes back in those of one that is."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import aiohttp
import orjson

from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.engine_answer import bad_answer, engine_gone, object_of
from serving.gateway.engine_call import EngineCall, EngineUnreachable
from serving.protocol.errors import ApiError
from serving.protocol.requests import GenerationRequest, ModelRequest


class Events(Protocol):
    """A stream of the engine's, as the gateway reads those of its own engines."""

    def feed(self, data: bytes) -> bytes:
        """The complete events among what has arrived so far; errors of any kind are of what makes no sense."""

    def so_far(self) -> bytes:
        """The event that would have ended a stream which is broken off now; nothing if nothing is known."""


class ForeignCall(EngineCall):
    """Sends a request, and gives back what the relay gets from an engine of ours; its refusals are raised.

    Each kind of engine says what is to be seen to before, and what its answers and refusals mean.
    """

    hangs_up = True

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engine: Engine,
        endpoint: Endpoint,
        body: ModelRequest,
        sent: bytes,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(session, engine, endpoint, body, sent, headers)
        # Answers tell the names of models and adapters, never an alias.
        if body.model not in [adapter.name for adapter in engine.model.adapters]:
            body = body.model_copy(update={"model": engine.model.served_name})
        self._asked = body
        self._events = self._events_of(body) if isinstance(body, GenerationRequest) else None
        self._response: aiohttp.ClientResponse | None = None
        self._working: asyncio.Task[Any] | None = None

    @abstractmethod
    def _events_of(self, asked: GenerationRequest) -> Events:
        """What reads a stream."""

    @abstractmethod
    async def _prepare(self) -> None:
        """What has to be done before the request is sent; raises :class:`ApiError` for what cannot be sent."""

    @abstractmethod
    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        """A whole answer; errors of any kind are of what makes no sense."""

    @abstractmethod
    def _refusal(self, status: int, body: Mapping[str, Any]) -> ApiError:
        """An error response."""

    async def open(self) -> aiohttp.ClientResponse:
        """Send the request; returns once the response's headers are there."""
        self._working = asyncio.current_task()
        try:
            await self._prepare()
            return await self._sent()
        finally:
            self._working = None

    async def _sent(self) -> aiohttp.ClientResponse:
        response = self._response = await super().open()
        if response.status != 200:
            raise self._refusal(response.status, _object_or_nothing(await response.read()))
        return response

    async def answer(self) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send the request and read the whole response."""
        self._working = asyncio.current_task()
        try:
            response, payload = await super().answer()
        finally:
            self._working = None
        body = object_of(self.engine, payload)
        try:
            return response, orjson.dumps(self._whole(body))
        except (AttributeError, LookupError, TypeError) as error:
            raise bad_answer(self.engine.model.served_name) from error

    async def chunks(self, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The events of a stream that was opened; raises :class:`aiohttp.ClientError` if it is cut off."""
        assert self._events is not None
        try:
            async for data in super().chunks(upstream):
                yield self._events.feed(data)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise aiohttp.ClientPayloadError(f"its stream makes no sense: {error!r}") from error

    async def cancel(self) -> None:
        """Hang up: that is how it learns that nobody waits any more."""
        if self._response is not None:
            self._response.close()
        elif self._working is not None:
            self._working.cancel()

    def last_words(self) -> bytes:
        """What it had used when it last said so."""
        return self._events.so_far() if self._events is not None else b""

    async def _told_at(self, path: str) -> dict[str, Any]:
        """What the engine tells of itself at a path; raises :class:`ApiError`."""
        try:
            async with self._session.get(
                f"{self._endpoint.base_url}{path}", headers=self._headers
            ) as answer:
                return object_of(self.engine, await answer.read())
        except aiohttp.ClientConnectorError as error:
            raise EngineUnreachable.of(self.engine) from error
        except aiohttp.ClientError as error:
            raise engine_gone(self.engine) from error


def _object_or_nothing(payload: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return {}
    return body if isinstance(body, dict) else {}
