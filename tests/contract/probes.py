"""For each thing that not every engine can do, the smallest request for it, and the field that asks for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.contract.engines import CHAT, EMBEDDING

_CHAT, _COMPLETIONS, _EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
_IMAGE: Any = {"type": "image_url", "image_url": {"url": _PIXEL}}
_SCHEMA: Any = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Probe:
    """A request. The refusal of an engine that cannot do it names ``param``, or one of several that it is about."""

    param: str | tuple[str, ...] | None
    fields: dict[str, Any] = field(default_factory=dict)
    path: str = _CHAT

    @property
    def body(self) -> dict[str, Any]:
        """All fields of the request."""
        needed: dict[str, Any] = {"model": EMBEDDING if self.path == _EMBEDDINGS else CHAT}
        if self.path == _CHAT:
            needed |= {"messages": HELLO, "max_tokens": 2}
        elif self.path == _COMPLETIONS:
            needed |= {"prompt": "The sea is", "max_tokens": 2}
        elif self.path == _EMBEDDINGS:
            needed |= {"input": "The sea"}
        return needed | self.fields


_ONE_CALL = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 20}

PROBES: dict[str, Probe] = {
    "logprobs": Probe("logprobs", {"logprobs": True, "top_logprobs": 1}),
    "n": Probe("n", {"n": 2}),
    "seed": Probe("seed", {"seed": 1}),
    "logit_bias": Probe("logit_bias", {"logit_bias": {"100": -100}}),
    "penalties": Probe("frequency_penalty", {"frequency_penalty": 1, "presence_penalty": 1}),
    "top_k": Probe("top_k", {"top_k": 5}),
    "min_p": Probe("min_p", {"min_p": 0.1}),
    "stop": Probe("stop", {"stop": ["sea"]}),
    "ignore_eos": Probe("ignore_eos", {"ignore_eos": True}),
    "tools": Probe(
        ("tools", "tool_choice", "parallel_tool_calls"), {**_ONE_CALL, "tool_choice": "required"}
    ),
    "parallel_tools": Probe(
        ("parallel_tool_calls", "tools"), {"tools": [TOOL], "parallel_tool_calls": True}
    ),
    "json_object": Probe("response_format", {"response_format": {"type": "json_object"}}),
    "json_schema": Probe(
        "response_format",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "sure", "schema": _SCHEMA, "strict": True},
            }
        },
    ),
    "structured_outputs": Probe(
        "structured_outputs", {"structured_outputs": {"choice": ["yes", "no"]}}
    ),
    "reasoning_effort": Probe("reasoning_effort", {"reasoning_effort": "low"}),
    "images": Probe("messages", {"messages": [{"role": "user", "content": [_IMAGE]}]}),
    "completions": Probe(None, {}, _COMPLETIONS),
    "echo": Probe("echo", {"echo": True}, _COMPLETIONS),
    "token_prompts": Probe("prompt", {"prompt": [504, 3, 28]}, _COMPLETIONS),
    "suffix": Probe("suffix", {"suffix": " and deep."}, _COMPLETIONS),
    "embeddings": Probe(None, {}, _EMBEDDINGS),
    "dimensions": Probe("dimensions", {"dimensions": 8}, _EMBEDDINGS),
    "rerank": Probe(None, {"query": "the sea", "documents": ["waves", "sand"]}, "/v1/rerank"),
    "tokenize": Probe(None, {"prompt": "The sea"}, "/tokenize"),
}
