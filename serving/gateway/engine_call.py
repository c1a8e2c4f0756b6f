"""One request on its way to an engine of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import ClassVar, Self

import aiohttp

from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.engine_answer import engine_gone
from serving.gateway.remote_call import NotStarted
from serving.protocol.errors import ApiError
from serving.protocol.requests import ModelRequest
from serving.protocol.responses import new_id


class EngineUnreachable(NotStarted):
    """Nobody listens where the engine was: its process has ended, and was sent nothing of the request."""

    @classmethod
    def of(cls, engine: Engine) -> Self:
        """That of an engine."""
        gone = engine_gone(engine)
        return cls(
            *(gone.status, gone.message),
            code=gone.code,
            retry_after_seconds=gone.retry_after_seconds,
        )


class EngineCall:
    """Sends a request, and tells the engine when nobody waits for it any more."""

    # Whether it is cancelled by breaking it off; then nothing more is heard of it.
    hangs_up: ClassVar[bool] = False

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engine: Engine,
        endpoint: Endpoint,
        body: ModelRequest,
        sent: bytes,
        headers: Mapping[str, str],
    ) -> None:
        """``headers`` tell of whom the request is."""
        self.engine = engine
        self._session = session
        self._endpoint = endpoint
        self._url = self._endpoint.base_url + body.path
        self._body = sent
        # Clients may repeat their request ids; the engine needs one that is unique.
        self._engine_request_id = new_id("call")
        self._headers = {
            "authorization": f"Bearer {self._endpoint.api_key}",
            "content-type": "application/json",
            "x-request-id": self._engine_request_id,
            **headers,
        }

    async def open(self) -> aiohttp.ClientResponse:
        """Send the request; returns once the response's headers are there.

        Raises :class:`ApiError`, of which :class:`EngineUnreachable` is one.
        """
        try:
            return await self._post()
        except aiohttp.ServerTimeoutError as error:
            name = self.engine.model.served_name
            raise ApiError(
                504, f"The engine of '{name}' does not answer.", code="engine_timeout"
            ) from error
        except aiohttp.ClientError as error:
            raise engine_gone(self.engine) from error

    async def _post(self) -> aiohttp.ClientResponse:
        try:
            return await self._session.post(self._url, data=self._body, headers=self._headers)
        except aiohttp.ClientConnectorError as error:
            raise EngineUnreachable.of(self.engine) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            # Most likely it was an idle connection, which the engine closed in that moment. One that has died
            # over the request takes no second one.
            return await self._session.post(self._url, data=self._body, headers=self._headers)

    async def answer(self) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send the request and read the whole response."""
        response = await self.open()
        try:
            return response, await response.read()
        except aiohttp.ClientError as error:
            raise engine_gone(self.engine) from error

    def chunks(self, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The bytes of a stream that was opened, as they come."""
        return upstream.content.iter_any()

    async def cancel(self) -> None:
        """Ask the engine to end the request now, in order, with its usage so far."""
        url = f"{self._endpoint.base_url}/internal/cancel/{self._engine_request_id}"
        with contextlib.suppress(aiohttp.ClientError):
            async with self._session.post(url, headers=self._headers):
                pass

    def last_words(self) -> bytes:
        """The event with the usage of a stream that was broken off, where the engine does not send it."""
        return b""
