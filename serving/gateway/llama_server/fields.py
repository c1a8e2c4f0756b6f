"""What llama-server does not honour of a request. It would leave most of that out in silence: so it is refused here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from serving.config import LlamaServerModel
from serving.gateway.foreign_words import image_urls, impossible_images
from serving.gateway.llama_server.schemas import reason_to_refuse
from serving.protocol.embeddings import (
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
)

_FORMS = "llama-server has its own grammars; response_format works"
_TEMPLATE = "llama-server does not say whether the model's template knows it"
_TOOLS = "with some models' templates llama-server holds no answer to it, and does not say so"
_OF_GENERATION = {
    **dict.fromkeys(
        (
            *("structured_outputs", "guided_json", "guided_regex"),
            *("guided_choice", "guided_grammar"),
        ),
        _FORMS,
    ),
    "n": "llama-server tells the tokens of the first choice only, so the others could not be metered",
}
REFUSED: Mapping[type[ModelRequest], Mapping[str, str]] = {
    ChatCompletionRequest: {
        **_OF_GENERATION,
        "reasoning_effort": _TEMPLATE,
        "chat_template_kwargs": _TEMPLATE,
    },
    CompletionRequest: {
        **_OF_GENERATION,
        "echo": "llama-server does not repeat prompts",
        "suffix": "llama-server fills in the middle at another endpoint, in its own way",
        "logprobs": "llama-server tells them in the form of chat completions only",
    },
    EmbeddingRequest: {"dimensions": "llama-server gives vectors of the model's own length"},
    RerankRequest: {},
    TokenizeRequest: {"reasoning_effort": _TEMPLATE, "chat_template_kwargs": _TEMPLATE},
    DetokenizeRequest: {},
}
"""By kind of request, the fields that it does not honour, and why."""

NOTHING: Mapping[str, tuple[Any, ...]] = {"n": (1,), "echo": (False,), "suffix": ("",)}
"""Values of these fields that ask for nothing."""


def unhonoured(model: LlamaServerModel, asked: ModelRequest) -> Iterator[tuple[str, str]]:
    """Fields of a request that could be left out, if need be, and why they are not honoured."""
    for name, reason in REFUSED[type(asked)].items():
        value = getattr(asked, name)
        if value is not None and value not in NOTHING.get(name, ()):
            yield name, reason
    if not isinstance(asked, ChatCompletionRequest):
        return
    if any(message.name is not None and message.role != "tool" for message in asked.messages):
        yield "messages[].name", "llama-server does not tell templates who speaks"
    if asked.logprobs and asked.tools and asked.stream:
        yield "logprobs", "llama-server does not tell them in a stream that may have tool calls"
    use = asked.tool_use
    if use is not None and use.required:
        yield "tool_choice", _TOOLS
    if use is not None and asked.parallel_tool_calls is False:
        yield "parallel_tool_calls", _TOOLS
    wanted = asked.response_format and asked.response_format.constraint
    if wanted is not None and use is not None:
        yield "response_format", "llama-server holds a request with tools to no other form"
    elif asked.response_format and asked.response_format.json_schema:
        schema = asked.response_format.json_schema.json_schema or {}
        if too_loose := reason_to_refuse(schema):
            yield (
                "response_format",
                f"llama-server's grammar of the schema is too loose: {too_loose}",
            )


def impossible(model: LlamaServerModel, asked: ModelRequest) -> tuple[str, str] | None:
    """What of a request can be neither honoured nor left out, and why."""
    if isinstance(asked, CompletionRequest) and len(asked.prompts) > 1:
        return "prompt", "llama-server tells the tokens of the first of several prompts only"
    if isinstance(asked, ChatCompletionRequest) and any(
        tool.function.strict for tool in asked.tools or ()
    ):
        return "tools", f"'strict' is more than llama-server keeps to; {_TOOLS}"
    if image_urls(asked) and model.projector is None:
        return "messages", "the model sees no images; its config has no projector"
    return impossible_images(asked)
