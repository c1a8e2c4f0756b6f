"""What OpenAI's own API knows of a request: the rest is not sent there in silence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from serving.protocol.embeddings import EmbeddingRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
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
_REASONING = "reasoning_content"


def only_openai(name: str, asked: Asked, *, lenient: bool) -> tuple[Asked, list[str]]:
    """A request without what OpenAI's API does not know, and the names of that.

    Raises :class:`ApiError` (400) for what cannot be left out, and, unless ``lenient``, for what could.
    """
    known = OPENAI_FIELDS.get(type(asked))
    if known is None:
        raise ApiError(
            400,
            f"The model '{name}' is served by an OpenAI-compatible API, which has no {asked.path}.",
            param="model",
            code=UNSUPPORTED_PARAMETER,
        )
    beyond: dict[str, Any] = {
        field: None
        for field in sorted(asked.model_fields_set - known)
        if getattr(asked, field) is not None
    }
    names = list(beyond)
    if isinstance(asked, ChatCompletionRequest) and any(
        message.reasoning_content is not None for message in asked.messages
    ):
        names.append(f"messages[].{_REASONING}")
        beyond["messages"] = [
            message.model_copy(update={_REASONING: None})
            # One that holds nothing else cannot do without.
            if message.content is not None or message.tool_calls
            else message.model_copy(update={_REASONING: None, "content": ""})
            for message in asked.messages
        ]
    if names and not lenient:
        raise ApiError(
            400,
            f"'{names[0]}' is not supported: the model '{name}' is served by an OpenAI-compatible "
            "API, which has no such field.",
            param=names[0],
            code=UNSUPPORTED_PARAMETER,
        )
    if not names:
        return asked, []
    return asked.model_copy(update=beyond), names
