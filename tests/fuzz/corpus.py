"""Requests that are right, of every kind: what fuzzing starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from serving.protocol.anthropic import CountTokensRequest, MessagesRequest
from serving.protocol.batches import BatchRequest
from serving.protocol.embeddings import (
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from serving.protocol.openai_responses import ResponseRequest
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest

CHAT_MODEL = "smollm2-135m"
EMBEDDING_MODEL = "minilm"
RERANKER = "reranker"

_SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
_FUNCTION = {"name": "look", "description": "Look.", "parameters": _SCHEMA}
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
_IMAGE_BLOCK = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/png", "data": _PIXEL.partition(",")[2]},
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request: where it goes, what describes its body, and bodies that are right or nearly so."""

    path: str
    described_by: type[BaseModel]
    bodies: tuple[dict[str, Any], ...]
    is_metered: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """The fields that a body may have, each with its JSON schema."""
        properties: dict[str, Any] = self.described_by.model_json_schema()["properties"]
        return properties


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "Hi."}], **fields}


KINDS = (
    Kind(
        "/v1/chat/completions",
        ChatCompletionRequest,
        (
            _chat(max_tokens=1),
            _chat(stream=True, stream_options={"include_usage": True}, n=2, seed=1),
            _chat(temperature=0.5, top_p=0.9, stop=["a", "b"], logprobs=True, top_logprobs=2),
            _chat(tools=[{"type": "function", "function": _FUNCTION}], tool_choice="auto"),
            _chat(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": _SCHEMA},
                }
            ),
            _chat(guided_regex="[ab]+", logit_bias={"5": 1.0}, user="ann", metadata={"a": "b"}),
            _chat(
                messages=[
                    {"role": "system", "content": "Be short."},
                    {"role": "user", "content": [{"type": "text", "text": "Look:"}]},
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "look", "arguments": '{"x": 1}'},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "A sea."},
                ]
            ),
            _chat(
                messages=[
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": _PIXEL}}],
                    }
                ]
            ),
        ),
        is_metered=True,
    ),
    Kind(
        "/v1/completions",
        CompletionRequest,
        (
            {"model": CHAT_MODEL, "prompt": "The sea", "max_tokens": 1},
            {"model": CHAT_MODEL, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 1},
            {"model": CHAT_MODEL, "prompt": ["a", "b"], "stream": True, "suffix": "c"},
        ),
        is_metered=True,
    ),
    Kind(
        "/v1/embeddings",
        EmbeddingRequest,
        (
            {"model": EMBEDDING_MODEL, "input": ["a", "b"], "dimensions": 8},
            {"model": EMBEDDING_MODEL, "input": [5, 6], "encoding_format": "base64"},
        ),
        is_metered=True,
    ),
    Kind(
        "/v1/rerank",
        RerankRequest,
        (
            {
                "model": RERANKER,
                "query": "sea",
                "documents": ["a", "b"],
                "top_n": 1,
                "return_documents": True,
            },
        ),
        is_metered=True,
    ),
    Kind(
        "/tokenize",
        TokenizeRequest,
        (
            {"model": CHAT_MODEL, "prompt": "a b", "return_token_strs": True},
            {"model": CHAT_MODEL, "messages": _chat()["messages"], "add_special_tokens": True},
            {"model": EMBEDDING_MODEL, "prompt": "a b"},
        ),
    ),
    Kind(
        "/detokenize",
        DetokenizeRequest,
        (
            {"model": CHAT_MODEL, "tokens": [1, 2, 3]},
            {"model": EMBEDDING_MODEL, "tokens": [101, 5]},
        ),
    ),
    Kind(
        "/v1/responses",
        ResponseRequest,
        (
            {"model": CHAT_MODEL, "input": "Hi.", "max_output_tokens": 16},
            {"model": CHAT_MODEL, "input": "Hi.", "stream": True, "store": False},
            {
                "model": CHAT_MODEL,
                "input": [
                    {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
                    {
                        "type": "function_call_output",
                        "call_id": "1",
                        "output": [{"type": "input_image", "image_url": _PIXEL}],
                    },
                ],
            },
            {
                "model": CHAT_MODEL,
                "instructions": "Be short.",
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Hi."}]},
                    {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "A sea."},
                    {"type": "function_call", "call_id": "2", "name": "look", "arguments": "{}"},
                    {
                        "type": "function_call_output",
                        "call_id": "2",
                        "output": [{"type": "input_text", "text": "A sea."}],
                    },
                ],
                "tools": [{"type": "function", "strict": False, **_FUNCTION}],
                "text": {"format": {"type": "text"}},
                "previous_response_id": "resp_none",
            },
        ),
        is_metered=True,
    ),
    Kind(
        "/v1/messages",
        MessagesRequest,
        (
            _chat(max_tokens=1, system="Be short.", stop_sequences=["x"]),
            _chat(max_tokens=2, stream=True, temperature=0.5, top_k=5),
            {
                "model": CHAT_MODEL,
                "max_tokens": 2,
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "tool_use", "id": "t1", "name": "look", "input": {"x": 1}}
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "t1", "content": "A sea."}
                        ],
                    },
                ],
                "tools": [{"name": "look", "input_schema": _SCHEMA}],
                "tool_choice": {"type": "auto"},
            },
            {
                "model": CHAT_MODEL,
                "max_tokens": 2,
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}],
                    },
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "t1",
                                "content": [{"type": "text", "text": "A sea."}, _IMAGE_BLOCK],
                            },
                            _IMAGE_BLOCK,
                        ],
                    },
                ],
            },
        ),
        is_metered=True,
    ),
    Kind("/v1/messages/count_tokens", CountTokensRequest, (_chat(system="Be short."),)),
    Kind(
        "/v1/batches",
        BatchRequest,
        (
            {
                "input_file_id": "file-none",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
                "metadata": {"a": "b"},
            },
        ),
    ),
)

# A form that uploads a file: its fields, and the file's content.
UPLOAD = {
    "purpose": "batch",
    "expires_after[anchor]": "created_at",
    "expires_after[seconds]": "3600",
}

# Requests without a body; ``{}`` stands for an id, or for anything.
BODILESS = (
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{}"),
    ("GET", "/v1/responses/{}"),
    ("GET", "/v1/responses/{}/input_items"),
    ("POST", "/v1/responses/{}/cancel"),
    ("DELETE", "/v1/responses/{}"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{}"),
    ("GET", "/v1/files/{}/content"),
    ("DELETE", "/v1/files/{}"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{}"),
    ("POST", "/v1/batches/{}/cancel"),
    ("GET", "/{}"),
    ("POST", "/v1/{}"),
    ("POST", "/v1/messages/{}"),
    ("POST", "/admin/keys/{}/rotate"),
)
