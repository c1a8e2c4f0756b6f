"""One request on its way to another server: what it may cost, what its breaker learns, and how long it may take."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import aiohttp

from serving.engines.breaker import Passage
from serving.engines.remote import Remote
from serving.gateway.engine_answer import body_of, engine_gone
from serving.gateway.remote_stream import CanonicalEvents
from serving.gateway.spending import Purchase, Spending
from serving.gateway.token_bound import token_bounds
from serving.protocol.errors import ApiError
from serving.protocol.requests import ModelRequest
from serving.protocol.responses import new_id

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_RETRY_AFTER_SECONDS = 2
# The server does not take our key, or has no such model: that is for the operator to mend, not for clients.
_REFUSALS = frozenset((301, 302, 303, 307, 308, 401, 402, 403, 404, 405))
_READ_BYTES = 4096
# How long a stream that has said its last word may take to end; then its connection is of no more use.
_END_SECONDS = 0.5
_SHOWN_CHARACTERS = 300


class NotStarted(ApiError):
    """A request that did not reach its server, or was turned away there: nothing was done for it."""


@dataclass(frozen=True, slots=True)
class Clearance:
    """A request may go to a remote: its breaker lets it through, and its budget allows it."""

    passage: Passage
    purchase: Purchase | None


def clear(remote: Remote, body: ModelRequest, sent: bytes, spending: Spending | None) -> Clearance:
    """Let a request go to a remote; raises :class:`ApiError` (503) if it may not.

    Without ``spending`` it is one that costs nothing anywhere.
    """
    passage = remote.breaker.enter()
    if passage is None:
        seconds = remote.breaker.seconds_until_probe
        raise ApiError(
            503,
            f"The server of the model '{remote.model.name}' does not work; it is asked again in a moment.",
            code="remote_unavailable",
            retry_after_seconds=1 if seconds == float("inf") else int(seconds) + 1,
        )
    try:
        purchase = None
        if spending is not None and remote.model.costs_money:
            purchase = spending.reserve(remote.model, *token_bounds(remote.model, body, sent))
    except BaseException:
        passage.withdraw()
        raise
    return Clearance(passage, purchase)


class RemoteCall:
    """Sends a request, and gives back what the relay gets from an engine of its own."""

    hangs_up: ClassVar[bool] = True

    def __init__(
        self,
        session: aiohttp.ClientSession,
        remote: Remote,
        body: ModelRequest,
        sent: bytes,
        passage: Passage,
        *,
        streamed: bool,
        rig_headers: Mapping[str, str],
    ) -> None:
        """``rig_headers`` are for other rigs only."""
        self.engine = remote
        self._session = session
        self._url = remote.url(body.path)
        self._sent = sent
        self._passage = passage
        self._streamed = streamed
        self._first = b""
        self._response: aiohttp.ClientResponse | None = None
        self._working: asyncio.Task[Any] | None = None
        # Nothing of who asks, and of what engines are told: the server is somebody else's.
        self._headers = {
            "content-type": "application/json",
            "x-request-id": new_id("call"),
            **remote.authorization,
            **(rig_headers if remote.model.dialect == "rigserve" else {}),
        }

    async def open(self) -> aiohttp.ClientResponse:
        """Send the request; returns once the response's headers, and the first bytes of a stream, are there.

        Raises :class:`ApiError`: 503, 504, or 502 for what the operator must mend.
        """
        return await self._in_time(self._open())

    async def answer(self) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send the request and read the whole response."""

        async def work() -> tuple[aiohttp.ClientResponse, bytes]:
            response = await self._open()
            return response, await body_of(response)

        return await self._in_time(work())

    async def chunks(self, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The events of a stream that was opened; raises :class:`aiohttp.ClientError` if it is cut off."""
        events, data = CanonicalEvents(), self._first
        try:
            while data and not events.finished:
                yield events.feed(data)
                if not events.finished:
                    async with asyncio.timeout(self.engine.model.idle_timeout_seconds):
                        data = await upstream.content.readany()
        except (TimeoutError, ValueError) as error:
            upstream.close()
            self._passage.failed()
            raise aiohttp.ClientPayloadError(str(error) or "it does not go on") from error
        except aiohttp.ClientError:
            self._passage.failed()
            raise
        if events.finished:
            await _end(upstream)
        else:
            self._passage.failed()

    async def cancel(self) -> None:
        """Hang up: that is how servers learn that nobody waits any more. It is no failure of theirs."""
        if self._working is not None:
            self._working.cancel()
        else:
            self._hang_up()

    def last_words(self) -> bytes:
        """Nothing: servers do not tell of their work while they do it."""
        return b""

    async def _in_time(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do ``work`` in the time for the first byte; what goes wrong is an :class:`ApiError`."""
        model = self.engine.model
        self._working = asyncio.current_task()
        try:
            async with asyncio.timeout(model.first_byte_timeout_seconds):
                result = await work
        except asyncio.CancelledError:
            self._passage.withdraw()
            self._hang_up()
            raise
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self._passage.failed()
            _log.warning("%s: cannot reach %s: %s", model.name, self._url, error)
            raise NotStarted(
                503,
                f"The server of the model '{model.name}' cannot be reached.",
                code="remote_unreachable",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            ) from error
        except TimeoutError as error:
            self._passage.failed()
            self._hang_up()
            raise ApiError(
                504,
                f"The server of the model '{model.name}' has not answered within "
                f"{model.first_byte_timeout_seconds:g} s.",
                code="remote_timeout",
            ) from error
        except aiohttp.ClientError as error:
            self._passage.failed()
            _log.warning("%s: %s broke off: %s", model.name, self._url, error)
            raise engine_gone(self.engine) from error
        except ApiError:
            self._passage.failed()
            raise
        finally:
            self._working = None
        # The first word counts: this changes nothing for what has failed.
        self._passage.succeeded()
        return result

    def _shown(self, body: bytes) -> str:
        """The beginning of an error's body, without our key: some servers say which one they refuse."""
        text = body.decode(errors="replace")
        key = self._headers.get("authorization", "").removeprefix("Bearer ")
        return (text.replace(key, "[redacted]") if key else text)[:_SHOWN_CHARACTERS]

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()

    async def _open(self) -> aiohttp.ClientResponse:
        model = self.engine.model
        response = await self._session.post(
            self._url,
            data=self._sent,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=model.connect_timeout_seconds,
                sock_connect=model.connect_timeout_seconds,
                sock_read=max(model.first_byte_timeout_seconds, model.idle_timeout_seconds),
            ),
            # Where requests and keys go is for the config to say, not for an answer.
            allow_redirects=False,
        )
        self._response = response
        if response.status in _REFUSALS:
            body = await response.content.read(_READ_BYTES)
            _log.error(
                "%s: %s refuses: %d %r",
                *(self.engine.model.name, self._url, response.status, self._shown(body)),
            )
            response.close()
            raise NotStarted(
                502,
                f"The server of the model '{self.engine.model.name}' refuses requests (status "
                f"{response.status}); the operator has to see to its base_url, model and API key.",
                code="remote_refused",
            )
        if response.status == 429 or (response.status == 503 and "retry-after" in response.headers):
            # It works, and has too much to do just now.
            self._passage.withdraw()
        elif response.status >= 500:
            self._passage.failed()
        elif self._streamed and response.status == 200:
            self._first = await response.content.readany()
            if not self._first:
                raise aiohttp.ClientPayloadError("the stream is empty")
        return response


async def _end(upstream: aiohttp.ClientResponse) -> None:
    """Read what is left of a stream that has said its last word, so that its connection can be used again."""
    try:
        async with asyncio.timeout(_END_SECONDS):
            async for _ in upstream.content.iter_any():
                pass
    except (TimeoutError, aiohttp.ClientError):
        upstream.close()
