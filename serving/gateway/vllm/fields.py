"""What vLLM does not honour of a request. What it would leave out in silence is refused here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)

REFUSED: Mapping[type[ModelRequest], Mapping[str, str]] = {
    CompletionRequest: {"suffix": "vLLM does not fill in the middle"},
    TokenizeRequest: {"reasoning_effort": "vLLM does not count with it"},
}
"""By kind of request, the fields that it does not honour, and why."""

NOTHING: Mapping[str, tuple[Any, ...]] = {"suffix": ("",)}
"""Values of these fields that ask for nothing."""


def unhonoured(asked: ModelRequest) -> Iterator[tuple[str, str]]:
    """Fields of a request that could be left out, if need be, and why they are not honoured."""
    for name, reason in REFUSED.get(type(asked), {}).items():
        value = getattr(asked, name)
        if value is not None and value not in NOTHING.get(name, ()):
            yield name, reason
    if isinstance(asked, GenerationRequest) and asked.choices > 1 and asked.temperature == 0:
        yield "n", "vLLM gives one answer where temperature is 0: all would be the same"
    if isinstance(asked, ChatCompletionRequest):
        use = asked.tool_use
        wanted = asked.response_format and asked.response_format.constraint
        if wanted is not None and use is not None:
            yield "response_format", "vLLM holds a request with tools to no other form"
