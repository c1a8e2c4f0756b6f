"""What servers of other kinds know of a request: the rest is not sent there in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from serving.config import AnyModel, LlamaServerModel, RemoteModel, VllmModel
from serving.gateway.foreign_words import impossible_images
from serving.gateway.llama_server.fields import impossible, unhonoured
from serving.gateway.vllm import fields as of_vllm
from serving.protocol.embeddings import EmbeddingRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    ModelRequest,
)

Asked = TypeVar("Asked", bound=ModelRequest)

_OF_GENERATION = frozenset(
    (
        *("model", "user", "temperature", "top_p", "seed", "stop", "max_tokens", "n"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs"),
        *("stream", "stream_options"),
    )
)
OPENAI_FIELDS: Mapping[type[ModelRequest], frozenset[str]] = {
    ChatCompletionRequest: _OF_GENERATION
    | {
        *("messages", "max_completion_tokens", "top_logprobs", "response_format"),
        *("service_tier", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"),
        # They go no further than the gateway.
        *("safety_identifier", "prompt_cache_key"),
    },
    CompletionRequest: _OF_GENERATION | {"prompt", "echo", "suffix"},
    EmbeddingRequest: frozenset(("model", "user", "input", "encoding_format", "dimensions")),
}
_OF_MESSAGES, _REASONING = "messages[].", "reasoning_content"


def dialect_of(model: AnyModel) -> Callable[..., tuple[Any, list[str]]] | None:
    """What :func:`only_openai` is to OpenAI's API, for the server of a model; None if it knows all that we do."""
    if isinstance(model, RemoteModel):
        return only_openai if model.dialect == "openai" else None
    if isinstance(model, VllmModel):
        return only_vllm
    return only_llama_server if isinstance(model, LlamaServerModel) else None


def only_openai(model: RemoteModel, asked: Asked, *, lenient: bool) -> tuple[Asked, list[str]]:
    """A request without what OpenAI's API does not know, and the names of that.

    Raises :class:`ApiError` (400) for what cannot be left out, and, unless ``lenient``, for what could.
    """
    known = OPENAI_FIELDS.get(type(asked))
    if known is None:
        raise ApiError(
            400,
            f"The model '{model.name}' is served by an OpenAI-compatible API, which has no {asked.path}.",
            param="model",
            code=UNSUPPORTED_PARAMETER,
        )
    reason = (
        f"the model '{model.name}' is served by an OpenAI-compatible API, which has no such field"
    )
    beyond = {
        field: reason
        for field in sorted(asked.model_fields_set - known)
        if getattr(asked, field) is not None
    }
    if isinstance(asked, ChatCompletionRequest) and any(
        message.reasoning_content is not None for message in asked.messages
    ):
        beyond[f"{_OF_MESSAGES}{_REASONING}"] = reason
    return _without(asked, beyond, lenient=lenient)


def only_llama_server(
    model: LlamaServerModel, asked: Asked, *, lenient: bool
) -> tuple[Asked, list[str]]:
    """A request without what llama-server does not honour, and the names of that; raises as :func:`only_openai`."""
    found = impossible(model, asked)
    if found is not None:
        raise _refusal(*found)
    return _without(asked, dict(unhonoured(model, asked)), lenient=lenient)


def only_vllm(_model: VllmModel, asked: Asked, *, lenient: bool) -> tuple[Asked, list[str]]:
    """A request without what vLLM does not honour, and the names of that; raises as :func:`only_openai`."""
    found = impossible_images(asked)
    if found is not None:
        raise _refusal(*found)
    return _without(asked, dict(of_vllm.unhonoured(asked)), lenient=lenient)


def _without(asked: Asked, beyond: Mapping[str, str], *, lenient: bool) -> tuple[Asked, list[str]]:
    """A request without these fields; raises :class:`ApiError` for the first of them unless ``lenient``."""
    if not beyond:
        return asked, []
    if not lenient:
        raise _refusal(*next(iter(beyond.items())))
    changes: dict[str, Any] = {name: None for name in beyond if not name.startswith(_OF_MESSAGES)}
    of_messages = [
        name.removeprefix(_OF_MESSAGES) for name in beyond if name.startswith(_OF_MESSAGES)
    ]
    if of_messages and isinstance(asked, ChatCompletionRequest):
        changes["messages"] = [_bare(message, of_messages) for message in asked.messages]
    return asked.model_copy(update=changes), list(beyond)


def _bare(message: Message, names: list[str]) -> Message:
    """A message without these fields; one that holds nothing else has an empty text instead."""
    changes: dict[str, Any] = dict.fromkeys(names)
    if message.content is None and not message.tool_calls:
        changes["content"] = ""
    return message.model_copy(update=changes)


def _refusal(name: str, reason: str) -> ApiError:
    return ApiError(
        400, f"'{name}' is not supported: {reason}.", param=name, code=UNSUPPORTED_PARAMETER
    )
