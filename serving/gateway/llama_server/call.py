"""One request on its way to a llama-server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import orjson

from serving.config import LlamaServerModel
from serving.gateway.engine_answer import bad_answer, engine_gone, object_of
from serving.gateway.foreign_call import ForeignCall
from serving.gateway.llama_server.answer import Events, refusal, whole
from serving.gateway.llama_server.request import RENDER_PATH, to_tokenize
from serving.gateway.remote_call import NotStarted
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import ChatCompletionRequest, GenerationRequest, ModelRequest

_PROPERTIES_PATH = "/props"


class LlamaServerCall(ForeignCall):
    """As every call to another engine than ours; conversations to be tokenized are rendered before."""

    @property
    def _model(self) -> LlamaServerModel:
        assert isinstance(self.engine.model, LlamaServerModel)
        return self.engine.model

    def _events_of(self, asked: GenerationRequest) -> Events:
        return Events(asked)

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        return whole(self._model, self._asked, body)

    def _refusal(self, status: int, body: Mapping[str, Any]) -> ApiError:
        return refusal(self._model, self._asked, status, body)

    async def _prepare(self) -> None:
        if _speaks_of_tools(self._asked):
            await self._check_template()
        if isinstance(self._asked, TokenizeRequest) and self._asked.prompt is None:
            await self._render(self._asked)

    async def _check_template(self) -> None:
        """Raise :class:`NotStarted` (400) for tools that the model's template would leave out in silence."""
        abilities = (await self._told_at(_PROPERTIES_PATH)).get("chat_template_caps")
        if not isinstance(abilities, dict) or not (
            abilities.get("supports_tools") and abilities.get("supports_tool_calls")
        ):
            raise NotStarted(
                400,
                f"'tools' is not supported: the chat template of the model '{self._model.served_name}' has no place for "
                "tools and their calls, and llama-server would leave them out.",
                param="tools",
                code=UNSUPPORTED_PARAMETER,
            )

    async def _render(self, asked: TokenizeRequest) -> None:
        """Have a conversation made a text; that is then what is to be tokenized."""
        url, self._url = self._url, f"{self._endpoint.base_url}{RENDER_PATH}"
        try:
            payload = await (await self._sent()).read()
        except aiohttp.ClientError as error:
            raise engine_gone(self.engine) from error
        text = object_of(self.engine, payload).get("prompt")
        if not isinstance(text, str):
            raise bad_answer(self.engine.model.served_name)
        self._url, self._body = url, orjson.dumps(to_tokenize(asked, text))
        self._response = None


def _speaks_of_tools(asked: ModelRequest) -> bool:
    if not isinstance(asked, ChatCompletionRequest | TokenizeRequest):
        return False
    in_use = asked.tool_use if isinstance(asked, ChatCompletionRequest) else asked.tools
    return bool(in_use) or any(message.tool_calls for message in asked.messages or ())
