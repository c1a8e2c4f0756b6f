"""Requests in vLLM's words."""

from __future__ import annotations

import json
from typing import Any

from serving.config import VllmModel
from serving.gateway.vllm.fields import REFUSED
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)

# They are for the gateway.
_OURS = {"user", "service_tier", "return_documents"}
# What may not be called is not shown, and so not named.
_OF_TOOLS = {"tools", "tool_choice", "parallel_tool_calls"}
# What vLLM called these before, which newer ones do not know.
_OLD_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def written(_model: VllmModel, asked: ModelRequest) -> bytes:
    """The body that vLLM gets for a request which ``fields`` lets through."""
    # Where ``readdressed`` finds it.
    return json.dumps({"model": asked.model, **_fields(asked)}).encode()


def readdressed(sent: bytes, asked: ModelRequest, name: str) -> bytes:
    """What was ``written`` for a model or an adapter, for one of another name."""
    end = len(_addressed(asked.model))
    return _addressed(name) + sent[end:]


def _addressed(name: str) -> bytes:
    return json.dumps({"model": name}).removesuffix("}").encode()


def _fields(asked: ModelRequest) -> dict[str, Any]:
    # What was refused unless it asks for nothing is left out.
    exclude = (
        _OURS
        | (_OF_TOOLS if isinstance(asked, ChatCompletionRequest) else set())
        | set(REFUSED.get(type(asked), ()))
    )
    fields = asked.model_dump(exclude=exclude, exclude_none=True, by_alias=True)
    if isinstance(asked, GenerationRequest):
        for old, new in _OLD_NAMES.items():
            if (value := fields.pop(old, None)) is not None:
                fields["structured_outputs"] = {new: value}
        if asked.stream:
            # So that it is known what was used if the stream is broken off.
            fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if isinstance(asked, ChatCompletionRequest):
        fields |= _of_chat(asked)
    elif isinstance(asked, CompletionRequest):
        fields["max_tokens"] = asked.token_limit
    return fields


def _of_chat(asked: ChatCompletionRequest) -> dict[str, Any]:
    use = asked.tool_use
    if use is None:
        return {}
    # Of several that are allowed it knows nothing: it gets those that may be called.
    names = {function.name for function in use.functions}
    tools = [
        tool.model_dump(exclude_none=True)
        for tool in asked.tools or ()
        if tool.function.name in names
    ]
    if use.required:
        # Otherwise it would hold the call to a name, and not to its arguments' schema.
        for tool in tools:
            tool["function"]["strict"] = True
    choice: Any = "required" if use.required else "auto"
    if use.required and not use.parallel and len(names) == 1:
        choice = {"type": "function", "function": {"name": next(iter(names))}}
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": use.parallel}
