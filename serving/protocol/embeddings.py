"""Embeddings (OpenAI's shape), reranking (Jina's and Cohere's) and tokenization (vLLM's)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.protocol.errors import conflict
from serving.protocol.requests import (
    MAX_TOOLS,
    ChatCompletionRequest,
    Messages,
    ModelRequest,
    ReasoningEffort,
    Tool,
    validated,
)
from serving.protocol.responses import Timings, new_id
from serving.protocol.structured import ListOf

# OpenAI's own limit.
MAX_INPUTS = 2048


class EmbeddingRequest(ModelRequest):
    """Body of ``POST /v1/embeddings``."""

    path = "/v1/embeddings"

    input: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        None, ge=1, description="Cut vectors to this length; they are normalised again."
    )

    @field_validator("input")
    @classmethod
    def _some_input(cls, value: Any) -> Any:
        if not value:
            raise ValueError("must not be empty")
        if isinstance(value, list) and not isinstance(value[0], int):
            if len(value) > MAX_INPUTS:
                raise ValueError(f"at most {MAX_INPUTS} inputs are allowed, got {len(value)}")
            for index, item in enumerate(value):
                if not item:
                    raise ValueError(f"input {index} is empty")
        return value

    @property
    def inputs(self) -> list[str | list[int]]:
        """Each input, as text or as token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [[token for token in self.input if isinstance(token, int)]]
        return [item for item in self.input if not isinstance(item, int)]


class RerankRequest(ModelRequest):
    """Body of ``POST /v1/rerank``."""

    path = "/v1/rerank"

    query: str = Field(min_length=1)
    documents: ListOf[str] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=1, description="Best results to return; unset: all.")
    return_documents: bool | None = Field(None, description="Repeat each document in its result.")


class TokenizeRequest(ModelRequest):
    """Body of ``POST /tokenize``: a text, or a conversation that is rendered first."""

    path = "/tokenize"

    prompt: str | None = None
    messages: Messages | None = None
    tools: ListOf[Tool] | None = Field(None, max_length=MAX_TOOLS)
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Add what the model wants around a text, such as BOS. Unset: true."
    )
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "either 'prompt' or 'messages' is required, and not both")
        for name in ("tools", "reasoning_effort", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name):
                raise conflict(name, f"'{name}' goes with 'messages' only")
        return self

    @property
    def chat(self) -> ChatCompletionRequest | None:
        """The chat completion whose prompt is asked for; None if it is a text's. Raises ``ApiError`` (400)."""
        if self.messages is None:
            return None
        fields = {
            name: getattr(self, name)
            for name in ("model", "messages", "tools", "reasoning_effort", "chat_template_kwargs")
        }
        return validated(ChatCompletionRequest, fields)


class DetokenizeRequest(ModelRequest):
    """Body of ``POST /detokenize``."""

    path = "/detokenize"

    tokens: ListOf[int]


def embeddings_json(
    model: str, embeddings: Iterable[object], *, prompt_tokens: int, timings: Timings
) -> dict[str, Any]:
    """The answer to an embedding request; each embedding is an array, or base64 text."""
    data = [
        {"object": "embedding", "index": index, "embedding": embedding}
        for index, embedding in enumerate(embeddings)
    ]
    return {"object": "list", "model": model, "data": data, **_metered(prompt_tokens, timings)}


def rerank_json(
    request: RerankRequest,
    model: str,
    scores: Sequence[float],
    *,
    prompt_tokens: int,
    timings: Timings,
) -> dict[str, Any]:
    """The answer to a rerank request: the most relevant first, equals in their own order."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
    results: list[dict[str, Any]] = [
        {"index": index, "relevance_score": scores[index]} for index in order
    ]
    if request.return_documents:
        for result in results:
            result["document"] = {"text": request.documents[result["index"]]}
    return {
        "id": new_id("rerank"),
        "model": model,
        "results": results,
        **_metered(prompt_tokens, timings),
    }


def _metered(prompt_tokens: int, timings: Timings) -> Mapping[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"usage": usage, "timings": timings.to_json()}
