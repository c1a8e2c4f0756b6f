"""The OpenAPI document: what each operation is for, examples that run as they are, and what comes back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from serving.gateway.intake import Gateway
from serving.protocol import answers
from serving.protocol.batches import FilesQuery, PageQuery
from serving.protocol.openai_responses import InputItemsQuery, RetrieveQuery
from serving.protocol.structured import Body

# The names that examples give to models that embed and that rerank: nothing tells which of a rig's models do.
EMBEDDING_MODEL = "all-minilm-l6-v2"
RERANKER = "bge-reranker-v2-m3"
_CHAT_MODEL = "MODEL"  # stands for the rig's first model

# In the order in which the page shows them.
_TAGS = (
    *("Inference", "Responses", "Messages", "Embeddings", "Tokens", "Models", "Batches"),
    *("Server", "Administration"),
)
_STREAM = "A stream of server-sent events, if the request asks for one with `stream`."
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds after which the same request may succeed.",
        "schema": {"type": "integer"},
    }
}
_UPLOAD = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSONL, a request a line."},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
}

_HELLO = [{"role": "user", "content": "What is the capital of France?"}]
_WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class _Operation:
    """What an operation's route does not say of itself.

    ``answer`` is the name of a schema of :mod:`serving.protocol.answers`, or a media type of what is no JSON.
    """

    tag: str
    summary: str
    answer: str
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    query: type[Body] | None = None
    is_streamed: bool = False
    status: int = 200
    may_be_503: str | None = None


def _asked(**fields: Any) -> dict[str, Any]:
    return {"model": _CHAT_MODEL, **fields}


_TOOL = {"name": "weather", "description": "The weather in a city.", "parameters": _WEATHER}
_OPERATIONS: dict[tuple[str, str], _Operation] = {
    ("post", "/v1/chat/completions"): _Operation(
        "Inference",
        "Chat completion",
        "ChatCompletion",
        {
            "plain": _asked(messages=_HELLO, max_tokens=32),
            "streamed": _asked(
                messages=_HELLO,
                max_tokens=32,
                stream=True,
                stream_options={"include_usage": True},
            ),
            "JSON of a schema": _asked(
                messages=[{"role": "user", "content": "Name a city."}],
                max_tokens=32,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "city", "schema": _WEATHER},
                },
            ),
            "with a tool": _asked(
                messages=[{"role": "user", "content": "What is the weather in Paris?"}],
                max_tokens=32,
                tools=[{"type": "function", "function": _TOOL}],
            ),
        },
        is_streamed=True,
    ),
    ("post", "/v1/completions"): _Operation(
        "Inference",
        "Text completion",
        "Completion",
        {
            "plain": _asked(prompt="The sea is", max_tokens=16),
            "streamed": _asked(prompt="The sea is", max_tokens=16, stream=True),
        },
        is_streamed=True,
    ),
    ("post", "/v1/responses"): _Operation(
        "Responses",
        "Create a response",
        "Response",
        {
            "plain": _asked(input="What is the capital of France?", max_output_tokens=32),
            "streamed": _asked(input="Name a city.", max_output_tokens=32, stream=True),
            "in the background": _asked(
                input="Name a city.", max_output_tokens=32, background=True
            ),
        },
        is_streamed=True,
    ),
    ("get", "/v1/responses/{response_id}"): _Operation(
        "Responses", "Retrieve a response", "Response", query=RetrieveQuery
    ),
    ("delete", "/v1/responses/{response_id}"): _Operation(
        "Responses", "Delete a response", "Deleted"
    ),
    ("post", "/v1/responses/{response_id}/cancel"): _Operation(
        "Responses", "Cancel a response", "Response"
    ),
    ("get", "/v1/responses/{response_id}/input_items"): _Operation(
        "Responses", "List a response's input", "List", query=InputItemsQuery
    ),
    ("post", "/v1/messages"): _Operation(
        "Messages",
        "Create a message",
        "Message",
        {
            "plain": _asked(messages=_HELLO, max_tokens=32),
            "streamed": _asked(messages=_HELLO, max_tokens=32, stream=True),
            "with a tool": _asked(
                messages=_HELLO,
                max_tokens=32,
                system="Be brief.",
                tools=[{"name": "weather", "input_schema": _WEATHER}],
            ),
        },
        is_streamed=True,
    ),
    ("post", "/v1/messages/count_tokens"): _Operation(
        "Messages", "Count a message's tokens", "MessageTokens", {"plain": _asked(messages=_HELLO)}
    ),
    ("post", "/v1/embeddings"): _Operation(
        "Embeddings",
        "Create embeddings",
        "Embeddings",
        {"two texts": {"model": EMBEDDING_MODEL, "input": ["A cat sits.", "A feline rests."]}},
    ),
    ("post", "/v1/rerank"): _Operation(
        "Embeddings",
        "Rerank documents",
        "Ranking",
        {
            "two documents": {
                "model": RERANKER,
                "query": "pets",
                "documents": ["Cats purr.", "Engines hum."],
                "top_n": 1,
                "return_documents": True,
            }
        },
    ),
    ("post", "/tokenize"): _Operation(
        "Tokens",
        "Tokenize",
        "Tokens",
        {
            "a text": _asked(prompt="The sea is blue.", return_token_strs=True),
            "a conversation": _asked(messages=_HELLO),
        },
    ),
    ("post", "/detokenize"): _Operation(
        "Tokens", "Detokenize", "Text", {"plain": _asked(tokens=[504, 5463, 314])}
    ),
    ("get", "/v1/models"): _Operation("Models", "List models", "Models"),
    ("get", "/v1/models/{name}"): _Operation("Models", "Retrieve a model", "Model"),
    ("get", "/v1/files"): _Operation("Batches", "List files", "Page", query=FilesQuery),
    ("post", "/v1/files"): _Operation("Batches", "Upload a file", "File"),
    ("get", "/v1/files/{file_id}"): _Operation("Batches", "Retrieve a file", "File"),
    ("delete", "/v1/files/{file_id}"): _Operation("Batches", "Delete a file", "Deleted"),
    ("get", "/v1/files/{file_id}/content"): _Operation(
        "Batches", "Download a file", "application/octet-stream"
    ),
    ("get", "/v1/batches"): _Operation("Batches", "List batches", "Page", query=PageQuery),
    ("post", "/v1/batches"): _Operation(
        "Batches",
        "Create a batch",
        "Batch",
        {
            "of an uploaded file": {
                "input_file_id": "file-ID",
                "endpoint": "/v1/chat/completions",
                "completion_window": "24h",
            }
        },
    ),
    ("get", "/v1/batches/{batch_id}"): _Operation("Batches", "Retrieve a batch", "Batch"),
    ("post", "/v1/batches/{batch_id}/cancel"): _Operation("Batches", "Cancel a batch", "Batch"),
    ("get", "/health"): _Operation("Server", "Is it alive?", "Health"),
    ("get", "/ready"): _Operation("Server", "Is it ready?", "Ready", may_be_503="Ready"),
    ("get", "/metrics"): _Operation("Server", "Metrics", "text/plain"),
    ("get", "/admin/keys"): _Operation("Administration", "List API keys", "List"),
    ("post", "/admin/keys"): _Operation(
        "Administration",
        "Make an API key",
        "Key",
        {"for a tenant": {"name": "ann", "tenant": "home", "requests_per_minute": 60}},
        status=201,
    ),
    ("get", "/admin/keys/{key}"): _Operation("Administration", "Retrieve an API key", "Key"),
    ("delete", "/admin/keys/{key}"): _Operation("Administration", "Revoke an API key", "Key"),
    ("post", "/admin/keys/{key}/revoke"): _Operation(
        "Administration", "Revoke an API key (as DELETE)", "Key"
    ),
    ("post", "/admin/keys/{key}/rotate"): _Operation(
        "Administration", "Renew an API key's secret", "Key", {"at once": {"grace_seconds": 0}}
    ),
    ("get", "/admin/models"): _Operation("Administration", "List engines", "List"),
    ("post", "/admin/models/{name}/load"): _Operation("Administration", "Load a model", "Engine"),
    ("post", "/admin/models/{name}/unload"): _Operation(
        "Administration", "Unload a model", "Engine"
    ),
    ("get", "/admin/adapters"): _Operation("Administration", "List LoRA adapters", "List"),
    ("post", "/admin/adapters"): _Operation(
        "Administration",
        "Add a LoRA adapter",
        "Adapter",
        {"of a file": _asked(name="legal", path="/srv/adapters/legal.gguf")},
        status=201,
    ),
    ("delete", "/admin/adapters/{adapter}"): _Operation(
        "Administration", "Remove a LoRA adapter", "Adapter"
    ),
    ("get", "/admin/reload"): _Operation("Administration", "How the last reload went", "Reload"),
    ("post", "/admin/reload"): _Operation("Administration", "Reload the config", "Reload"),
}


def describe(app: FastAPI, gateway: Gateway) -> None:
    """Complete the document that ``app`` makes of its routes."""
    of_routes = app.openapi

    def document() -> dict[str, Any]:
        told = copy.deepcopy(of_routes())
        parts = told.setdefault("components", {})
        parts["schemas"] = answers.SCHEMAS
        parts["responses"] = {
            "Refused": _content("Error", "The request was refused; nothing was charged for it."),
            "RefusedMessage": _content("MessageError", "The request was refused."),
            "Failed": {
                **_content("Error", "The server or an engine could not answer."),
                "headers": _RETRY_AFTER,
            },
        }
        # Whether a request must carry a key is the server's matter.
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"key": []}, {}]
        told["tags"] = [{"name": tag} for tag in _TAGS]
        model = gateway.router.backends[0].model.name
        for path, methods in told["paths"].items():
            for method, told_of_it in methods.items():
                if operation := _OPERATIONS.get((method, path)):
                    _complete(told_of_it, path, operation, model)
        return told

    app.openapi = document  # type: ignore[method-assign]


def _complete(told: dict[str, Any], path: str, operation: _Operation, model: str) -> None:
    """Add to what FastAPI tells of an operation."""
    told["summary"], told["tags"] = operation.summary, [operation.tag]
    kind = "Message" if path.startswith("/v1/messages") else ""
    told["responses"] = {
        str(operation.status): _answer(operation),
        "4XX": {"$ref": f"#/components/responses/Refused{kind}"},
        "5XX": {"$ref": "#/components/responses/Failed"},
    }
    if operation.may_be_503:
        told["responses"]["503"] = _content(operation.may_be_503, "Not now.")
    if operation.query is not None:
        told["parameters"] = [*told.get("parameters", ()), *_parameters(operation.query)]
    if path == "/v1/files" and operation.answer == "File":
        told["requestBody"] = {
            "required": True,
            "content": {"multipart/form-data": {"schema": _UPLOAD}},
        }
    if operation.examples:
        told["requestBody"]["content"]["application/json"]["examples"] = {
            name: {"value": _named(example, model)} for name, example in operation.examples.items()
        }


def _named(example: Mapping[str, Any], model: str) -> dict[str, Any]:
    """An example for the rig's own model."""
    return {**example, "model": model} if example.get("model") == _CHAT_MODEL else dict(example)


def _answer(operation: _Operation) -> dict[str, Any]:
    if "/" in operation.answer:
        told: dict[str, Any] = {"description": "What was asked for."}
        return told | {"content": {operation.answer: {"schema": {"type": "string"}}}}
    told = _content(operation.answer, "What was asked for.")
    if operation.is_streamed:
        told["content"]["text/event-stream"] = {
            "schema": {"type": "string", "description": _STREAM}
        }
    return told


def _content(schema: str, description: str) -> dict[str, Any]:
    media = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": media}


def _parameters(query: type[Body]) -> list[dict[str, Any]]:
    """The parameters of a query string that a route reads by itself."""
    schema = query.model_json_schema(by_alias=True)
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "schema": each,
        }
        for name, each in schema["properties"].items()
    ]
