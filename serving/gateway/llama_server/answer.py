"""llama-server's answers in the words of our own engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving.config import LlamaServerModel
from serving.gateway.foreign_words import rerank_result
from serving.gateway.remote_call import NotStarted
from serving.gateway.remote_stream import CanonicalEvents
from serving.protocol.embeddings import DetokenizeRequest, RerankRequest, TokenizeRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
)
from serving.protocol.responses import Usage, new_id
from serving.protocol.sse import event

_MILLISECONDS = 1000.0
# What it answers if the model is not of the kind that the request is for.
_NOT_IMPLEMENTED = 501
_RETRY_AFTER_SECONDS = 2
_TOO_LONG, _TOO_LONG_TO_EMBED = "exceed_context_size_error", "is too large to process"


def refusal(
    model: LlamaServerModel, asked: ModelRequest, status: int, body: Mapping[str, Any]
) -> ApiError:
    """An error response as an exception; one that says nothing was done for the request is :class:`NotStarted`."""
    error = body.get("error")
    told: Mapping[str, Any] = error if isinstance(error, dict) else {}
    message = str(told.get("message") or f"The engine of '{model.served_name}' answers {status}.")
    if told.get("type") == _TOO_LONG or _TOO_LONG_TO_EMBED in message:
        return NotStarted(
            400,
            f"{message}. This model's context takes {model.context_length} tokens.",
            param=_text_field(asked),
            code="context_length_exceeded",
        )
    if status == _NOT_IMPLEMENTED:
        return NotStarted(
            400,
            f"The model '{model.served_name}' cannot be asked this: {message}",
            param="model",
            code=UNSUPPORTED_PARAMETER,
        )
    if status < 500:
        return NotStarted(400, message, code="invalid_value")
    if status == 503:
        return NotStarted(
            503, message, code="model_not_ready", retry_after_seconds=_RETRY_AFTER_SECONDS
        )
    return ApiError(500, message, code="engine_failed")


def whole(model: LlamaServerModel, asked: ModelRequest, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer; what it used comes last in it, where it is looked for."""
    if isinstance(asked, TokenizeRequest):
        return _tokenized(model, asked, body)
    if isinstance(asked, DetokenizeRequest):
        return {"prompt": body["content"]}
    usage, timings = body.pop("usage"), body.pop("timings", None)
    if isinstance(asked, RerankRequest):
        body = {
            "id": new_id("rerank"),
            "model": asked.model,
            "results": [rerank_result(asked, each) for each in body["results"]],
        }
    elif isinstance(asked, GenerationRequest):
        body["id"] = _id(asked, body["id"])
        body["model"] = asked.model
        for choice in body["choices"]:
            _revise(asked, choice)
    else:
        body["model"] = asked.model
        for item in body["data"]:
            item.pop("encoding_format", None)
    return {**body, "usage": usage, **({"timings": seconds(timings)} if timings else {})}


def seconds(timings: Mapping[str, Any]) -> dict[str, float]:
    """What llama-server measured of a request: not how long it waited, nor its share of steps with others."""
    return {
        "prefill_seconds": timings["prompt_ms"] / _MILLISECONDS,
        "decode_seconds": timings["predicted_ms"] / _MILLISECONDS,
    }


class Events(CanonicalEvents):
    """A stream of llama-server's as the gateway reads those of its own engines."""

    def __init__(self, asked: GenerationRequest) -> None:
        super().__init__()
        self._asked = asked
        self._created: int | None = None
        # What was last said of the work so far.
        self._timings: Mapping[str, Any] | None = None

    def so_far(self) -> bytes:
        """The event that would have ended a stream which is broken off now; nothing if nothing is known."""
        timings = self._timings
        if timings is None:
            return b""
        usage = Usage(
            prompt_tokens=timings["cache_n"] + timings["prompt_n"],
            cached_tokens=timings["cache_n"],
            completion_tokens=timings["predicted_n"],
        )
        return event({"choices": [], "usage": usage.to_json(), "timings": seconds(timings)})

    def error(self, told: Any) -> Any:
        """An error that broke off the stream."""
        message = told.get("message") if isinstance(told, dict) else told
        return ApiError(500, str(message), code="engine_failed").body["error"]

    def revise(self, chunk: dict[str, Any]) -> None:
        """Bring one chunk into form."""
        self._timings = chunk.pop("timings", None) or self._timings
        # A stream has one date; llama-server tells that of each chunk.
        self._created = self._created or chunk.get("created")
        chunk |= {
            "id": _id(self._asked, chunk.get("id", "")),
            "created": self._created,
            "model": self._asked.model,
        }
        for choice in chunk.get("choices", ()):
            _revise(self._asked, choice)
        if self._asked.wants_usage_chunk:
            chunk.setdefault("usage", None)
        if chunk.get("usage") and self._timings:
            chunk["timings"] = seconds(self._timings)


def _id(asked: GenerationRequest, told: str) -> str:
    return told.replace("chatcmpl-", "cmpl-") if isinstance(asked, CompletionRequest) else told


def _text_field(asked: ModelRequest) -> str:
    names = ("messages", "prompt", "input", "documents")
    return next(name for name in names if name in type(asked).model_fields)


def _revise(asked: GenerationRequest, choice: dict[str, Any]) -> None:
    """Bring a choice into form, of a whole answer or a stream's chunk."""
    choice.setdefault("logprobs", None)
    message = choice.get("message")
    if message is not None:
        message.setdefault("refusal", None)
        for call in message.get("tool_calls", ()):
            call["id"] = call.get("id") or new_id("call")
        if message.get("tool_calls") or message.get("reasoning_content"):
            message["content"] = message.get("content") or None
    delta = choice.get("delta")
    if delta is not None:
        if "role" in delta:
            # By the order of these the gateway tells it from generated text.
            choice["delta"] = {"role": delta["role"], "content": "", "refusal": None}
        for call in delta.get("tool_calls", ()):
            if call.get("function", {}).get("name"):
                call["id"] = call.get("id") or new_id("call")
    if isinstance(asked, ChatCompletionRequest) and choice["logprobs"]:
        choice["logprobs"] = {
            "content": [
                _logprob(token, asked.top_logprobs or 0) for token in choice["logprobs"]["content"]
            ],
            "refusal": None,
        }


def _logprob(token: Mapping[str, Any], alternatives: int) -> dict[str, Any]:
    return {
        **_piece(token),
        "top_logprobs": [_piece(each) for each in token["top_logprobs"][:alternatives]],
    }


def _piece(token: Mapping[str, Any]) -> dict[str, Any]:
    return {name: token[name] for name in ("token", "logprob", "bytes")}


def _tokenized(
    model: LlamaServerModel, asked: TokenizeRequest, body: Mapping[str, Any]
) -> dict[str, Any]:
    tokens: list[Any] = body["tokens"]
    texts = None
    if asked.return_token_strs:
        texts = [_token_text(token["piece"]) for token in tokens]
        tokens = [token["id"] for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": model.context_length,
        "tokens": tokens,
        "token_strs": texts,
    }


def _token_text(piece: str | list[int]) -> str:
    """A token's text; one that is no whole character comes as its bytes."""
    return piece if isinstance(piece, str) else bytes(piece).decode("utf-8", errors="replace")
