"""One request on its way to a vLLM."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
import orjson

from serving.config import VllmModel
from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.engine_answer import bad_answer, engine_gone, object_of
from serving.gateway.engine_call import EngineCall
from serving.gateway.remote_call import NotStarted
from serving.gateway.vllm.answer import Events, refusal, whole
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER
from serving.protocol.requests import ChatCompletionRequest, GenerationRequest, ModelRequest

_TOKENIZER_PATH = "/tokenizer_info"
# A template that thinks knows at least one of these.
_EFFORT_NAMES = ("reasoning_effort", "enable_thinking")

# Of each process, the words of its model's chat template.
_templates: WeakKeyDictionary[Engine, tuple[Endpoint, frozenset[str]]] = WeakKeyDictionary()


class VllmCall(EngineCall):
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
        assert isinstance(engine.model, VllmModel)
        self._model = engine.model
        # Answers tell the names of models and adapters, never an alias.
        if body.model not in [adapter.name for adapter in self._model.adapters]:
            body = body.model_copy(update={"model": self._model.name})
        self._asked = body
        self._events = Events(self._model, body) if isinstance(body, GenerationRequest) else None
        self._response: aiohttp.ClientResponse | None = None
        self._working: asyncio.Task[Any] | None = None

    async def open(self) -> aiohttp.ClientResponse:
        """Send the request; returns once the response's headers are there."""
        self._working = asyncio.current_task()
        try:
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
        """Raise :class:`NotStarted` (400) for what the model's chat template would leave out in silence."""
        wanted = _of_template(self._asked)
        if not wanted:
            return
        known = await self._words_of_template()
        for param, names in wanted.items():
            if known.isdisjoint(names):
                raise NotStarted(
                    400,
                    f"'{param}' is not supported: the chat template of the model '{self._model.name}' does not know "
                    f"{' or '.join(names)}, and vLLM would leave it out.",
                    param=param,
                    code=UNSUPPORTED_PARAMETER,
                )

    async def _words_of_template(self) -> frozenset[str]:
        endpoint, known = _templates.get(self.engine, (None, frozenset[str]()))
        if endpoint is self._endpoint:
            return known
        url = f"{self._endpoint.base_url}{_TOKENIZER_PATH}"
        try:
            async with self._session.get(url, headers=self._headers) as answer:
                body = object_of(self.engine, await answer.read())
        except aiohttp.ClientError as error:
            raise engine_gone(self.engine) from error
        template = body.get("chat_template")
        words = frozenset(re.findall(r"\w+", template if isinstance(template, str) else ""))
        _templates[self.engine] = self._endpoint, words
        return words

    def _refusal(self, response: aiohttp.ClientResponse, payload: bytes) -> Exception:
        try:
            body = orjson.loads(payload)
        except orjson.JSONDecodeError:
            body = {}
        return refusal(
            self._model, self._asked, response.status, body if isinstance(body, dict) else {}
        )


def _of_template(asked: ModelRequest) -> dict[str, tuple[str, ...]]:
    """By field, the words of which the template must know one."""
    if not isinstance(asked, ChatCompletionRequest | TokenizeRequest):
        return {}
    wanted: dict[str, tuple[str, ...]] = {}
    in_use = asked.tool_use if isinstance(asked, ChatCompletionRequest) else asked.tools
    if in_use:
        wanted["tools"] = ("tools",)
    if any(message.tool_calls for message in asked.messages or ()):
        wanted["messages"] = ("tool_calls",)
    if asked.reasoning_effort is not None:
        wanted["reasoning_effort"] = _EFFORT_NAMES
    for name in asked.chat_template_kwargs or ():
        wanted["chat_template_kwargs"] = (name,)
    return wanted
