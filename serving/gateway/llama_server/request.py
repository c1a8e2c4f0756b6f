"""Requests in llama-server's words."""

from __future__ import annotations

import json
from typing import Any

from serving.config import LlamaServerModel
from serving.gateway.llama_server.fields import REFUSED
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)

# Of these seeds, the last stands for none there.
_SEEDS = 2**32 - 1
# They are for the gateway.
_OURS = {"user", "service_tier", "return_documents"}


def written(model: LlamaServerModel, asked: ModelRequest) -> bytes:
    """The body that llama-server gets for a request which ``fields`` lets through.

    That of a conversation to tokenize is for :data:`RENDER_PATH`; the answer is to be tokenized then.
    """
    return json.dumps(_fields(model, asked)).encode()


RENDER_PATH = "/apply-template"


def _fields(model: LlamaServerModel, asked: ModelRequest) -> dict[str, Any]:
    if isinstance(asked, TokenizeRequest) and asked.prompt is not None:
        return to_tokenize(asked, asked.prompt)
    # What was refused unless it asks for nothing is left out: some of it may not even be there.
    exclude = _OURS | set(REFUSED[type(asked)])
    fields = asked.model_dump(exclude=exclude, exclude_none=True, by_alias=True)
    if isinstance(asked, GenerationRequest):
        fields |= _of_generation(model, asked)
    if isinstance(asked, ChatCompletionRequest):
        fields |= _of_chat(asked)
    elif isinstance(asked, CompletionRequest):
        fields["max_tokens"] = asked.token_limit
    return fields


def to_tokenize(asked: TokenizeRequest, text: str) -> dict[str, Any]:
    """The body that has a text tokenized as a completion of it would be."""
    return {
        "content": text,
        "add_special": asked.add_special_tokens is not False,
        "parse_special": True,
        "with_pieces": bool(asked.return_token_strs),
    }


def _of_generation(model: LlamaServerModel, asked: GenerationRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.seed is not None:
        fields["seed"] = asked.seed % _SEEDS
    if asked.top_k is not None:
        fields["top_k"] = max(asked.top_k, 0)
    if asked.stream:
        fields["stream_options"] = {"include_usage": True}
        # So that it is known what was used if the stream is broken off.
        fields["timings_per_token"] = True
    if model.adapters:
        fields["lora"] = [
            {"id": number, "scale": adapter.scale}
            for number, adapter in enumerate(model.adapters)
            if adapter.name == asked.model
        ]
    return fields


def _of_chat(asked: ChatCompletionRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if asked.logprobs:
        # Without alternatives it would tell nothing of the tokens themselves.
        fields["top_logprobs"] = max(1, asked.top_logprobs or 0)
    use = asked.tool_use
    if use is not None:
        # It knows no choice among the tools: it gets those that may be called.
        names = {function.name for function in use.functions}
        fields["tools"] = [
            tool.model_dump(exclude_none=True)
            for tool in asked.tools or ()
            if tool.function.name in names
        ]
        fields["tool_choice"] = "auto"
        fields["parallel_tool_calls"] = True
    return fields
