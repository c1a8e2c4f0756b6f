"""One request on its way to a vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from serving.config import VllmModel
from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.foreign_call import ForeignCall
from serving.gateway.remote_call import NotStarted
from serving.gateway.vllm.answer import Events, refusal, whole
from serving.gateway.vllm.request import readdressed
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import ChatCompletionRequest, GenerationRequest, ModelRequest

_TOKENIZER_PATH = "/tokenizer_info"
# A template that thinks knows at least one of these.
_EFFORT_NAMES = ("reasoning_effort", "enable_thinking")

# Of each process, the words of its model's chat template.
_templates: WeakKeyDictionary[Engine, tuple[Endpoint, frozenset[str]]] = WeakKeyDictionary()


class VllmCall(ForeignCall):
    """As every call to another engine than ours; what the chat template does not know is refused before."""

    @property
    def _model(self) -> VllmModel:
        assert isinstance(self.engine.model, VllmModel)
        return self.engine.model

    def _events_of(self, asked: GenerationRequest) -> Events:
        return Events(self._model, asked)

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        return whole(self._model, self._asked, body)

    def _refusal(self, status: int, body: Mapping[str, Any]) -> ApiError:
        return refusal(self._model, self._asked, status, body)

    async def _prepare(self) -> None:
        await self._check_template()
        if self._asked.model != self._model.name:
            self._body = readdressed(self._body, self._asked, self._adapter())

    def _adapter(self) -> str:
        """What the engine calls the adapter that is asked for, as it is now."""
        called = self.engine.live_adapters.called(self._asked.model)
        if called is None:
            raise NotStarted(
                503,
                f"The model '{self._asked.model}' was removed a moment ago; ask again.",
                code="model_not_ready",
                retry_after_seconds=1,
            )
        return called

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
                    f"'{param}' is not supported: the chat template of the model '{self._model.served_name}' does not know "
                    f"{' or '.join(names)}, and vLLM would leave it out.",
                    param=param,
                    code=UNSUPPORTED_PARAMETER,
                )

    async def _words_of_template(self) -> frozenset[str]:
        endpoint, known = _templates.get(self.engine, (None, frozenset[str]()))
        if endpoint is self._endpoint:
            return known
        template = (await self._told_at(_TOKENIZER_PATH)).get("chat_template")
        words = frozenset(re.findall(r"\w+", template if isinstance(template, str) else ""))
        _templates[self.engine] = self._endpoint, words
        return words


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
