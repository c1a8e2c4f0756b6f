"""One request on its way to a llama-server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import orjson

from serving.config import LlamaServerModel
from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.engine_answer import bad_answer, engine_gone, object_of
from serving.gateway.engine_call import EngineCall
from serving.gateway.llama_server.answer import Events, refusal, whole
from serving.gateway.llama_server.request import RENDER_PATH, to_tokenize
from serving.gateway.remote_call import NotStarted
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER
from serving.protocol.requests import ChatCompletionRequest, GenerationRequest, ModelRequest

_PROPERTIES_PATH = "/props"


class LlamaServerCall(EngineCall):
    """Sends a request, and gives back what the relay gets from an engine of ours; its refusals are raised."""

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
        assert isinstance(engine.model, LlamaServerModel)
        self._model = engine.model
        # Answers tell the names of models and adapters, never an alias.
        if body.model not in [adapter.name for adapter in self._model.adapters]:
            body = body.model_copy(update={"model": self._model.name})
        self._asked = body
        self._events = Events(body) if isinstance(body, GenerationRequest) else None
        self._response: aiohttp.ClientResponse | None = None
        self._working: asyncio.Task[Any] | None = None

    async def open(self) -> aiohttp.ClientResponse:
        """Send the request; returns once the response's headers are there."""
        self._working = asyncio.current_task()
        try:
            if _speaks_of_tools(self._asked):
                await self._check_template()
            response = self._response = await super().open()
            if response.status != 200:
                raise self._refusal(response, await response.read())
            return response
        finally:
            self._working = None

    async def answer(self) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send the request and read the whole response."""
        self._working = asyncio.current_task()
        try:
            if isinstance(self._asked, TokenizeRequest) and self._asked.prompt is None:
                await self._render(self._asked)
            response, payload = await super().answer()
        finally:
            self._working = None
        body = object_of(self.engine, payload)
        try:
            return response, orjson.dumps(whole(self._model, self._asked, body))
        except (AttributeError, LookupError, TypeError) as error:
            raise bad_answer(self.engine.model.name) from error

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

    async def _check_template(self) -> None:
        """Raise :class:`NotStarted` (400) for tools that the model's template would leave out in silence."""
        url = f"{self._endpoint.base_url}{_PROPERTIES_PATH}"
        try:
            async with self._session.get(url, headers=self._headers) as answer:
                body = object_of(self.engine, await answer.read())
        except aiohttp.ClientError as error:
            raise engine_gone(self.engine) from error
        abilities = body.get("chat_template_caps")
        if not isinstance(abilities, dict) or not (
            abilities.get("supports_tools") and abilities.get("supports_tool_calls")
        ):
            raise NotStarted(
                400,
                f"'tools' is not supported: the chat template of the model '{self._model.name}' has no place for "
                "tools and their calls, and llama-server would leave them out.",
                param="tools",
                code=UNSUPPORTED_PARAMETER,
            )

    async def _render(self, asked: TokenizeRequest) -> None:
        """Have a conversation made a text; that is then what is to be tokenized."""
        url, self._url = self._url, f"{self._endpoint.base_url}{RENDER_PATH}"
        _, payload = await super().answer()
        text = object_of(self.engine, payload).get("prompt")
        if not isinstance(text, str):
            raise bad_answer(self.engine.model.name)
        self._url, self._body = url, orjson.dumps(to_tokenize(asked, text))

    def _refusal(self, response: aiohttp.ClientResponse, payload: bytes) -> Exception:
        try:
            body = orjson.loads(payload)
        except orjson.JSONDecodeError:
            body = {}
        return refusal(
            self._model, self._asked, response.status, body if isinstance(body, dict) else {}
        )


def _speaks_of_tools(asked: ModelRequest) -> bool:
    if not isinstance(asked, ChatCompletionRequest | TokenizeRequest):
        return False
    in_use = asked.tool_use if isinstance(asked, ChatCompletionRequest) else asked.tools
    return bool(in_use) or any(message.tool_calls for message in asked.messages or ())
