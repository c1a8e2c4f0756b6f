"""Response bodies, as plain dictionaries ready for JSON, and the events of a stream, as bytes."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import orjson

from serving.protocol.sse import event

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. ``cached_tokens`` of the prompt were found in the KV cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, Any]:
        """OpenAI's ``usage`` object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, as its engine measured it.

    The first three are what the client waited for. The ``busy`` ones are the engine's time that the
    request is charged with: each step's duration, shared equally among the rows of its batch.
    """

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_busy_seconds: float
    decode_busy_seconds: float

    def to_json(self) -> dict[str, float]:
        """The ``timings`` object that rigserve's engines add to a response."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and what the model thought of it. ``top`` holds (piece, logprob) pairs.

    ``logprob`` None: the first token of an echoed prompt, which nothing precedes.
    """

    piece: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]


@dataclass(slots=True)
class Choice:
    """One completion, gathered from its deltas. Of a chat, ``text`` is the message's content.

    ``stopped_by``: the stop string that ended it, if one did; clients get it as vLLM's ``stop_reason``.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: str | Mapping[str, Any]) -> None:
        """Take in what a stream would have sent: text, or a chat's delta."""
        if isinstance(delta, str):
            self.text += delta
            return
        self.text += delta.get("content", "")
        self.reasoning += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                function = dict(call["function"])
                self.tool_calls.append({"id": call["id"], "type": "function", "function": function})
            else:
                function = self.tool_calls[call["index"]]["function"]
                function["arguments"] += call["function"]["arguments"]

    @property
    def message(self) -> dict[str, Any]:
        """OpenAI's ``message``; content is null where there is something else instead."""
        instead: dict[str, Any] = {}
        if self.reasoning:
            instead["reasoning_content"] = self.reasoning
        if self.tool_calls:
            instead["tool_calls"] = self.tool_calls
        content = self.text or (None if instead else "")
        return {"role": "assistant", "content": content, "refusal": None, **instead}


def new_id(prefix: str) -> str:
    """A fresh identifier such as ``chatcmpl-…``."""
    return f"{prefix}-{uuid.uuid4().hex}"


class Envelope:
    """What every body and chunk of one response repeats.

    ``chat`` tells chat completions from text completions; ``usage_in_chunks`` is set when the client
    asked for usage, as OpenAI then puts ``"usage": null`` into every other chunk; ``service_tier`` is
    the one that served a request which named one.
    """

    def __init__(
        self,
        *,
        chat: bool,
        model: str,
        system_fingerprint: str,
        usage_in_chunks: bool = False,
        service_tier: str | None = None,
    ) -> None:
        """A new response's envelope, with a fresh id and the current time."""
        self.chat = chat
        self.id = new_id("chatcmpl" if chat else "cmpl")
        self._fields = {
            "id": self.id,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": system_fingerprint,
            **({"service_tier": service_tier} if service_tier else {}),
        }
        # Chunks are made for every token: all but their middle is made here, once.
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._chunk_fields = {**self._fields, "object": kind}
        opened = orjson.dumps(self._chunk_fields).removesuffix(b"}")
        self._head = b"data: " + opened + b',"choices":[{"index":'
        self._key = b',"delta":' if chat else b',"text":'
        self._tail = b'}],"usage":null}\n\n' if usage_in_chunks else b"}]}\n\n"

    def body(self, choices: Iterable[Choice], usage: Usage, timings: Timings) -> dict[str, Any]:
        """The whole response, for a request that does not stream."""
        return {
            **self._fields,
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage.to_json(),
            "timings": timings.to_json(),
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            **({"message": choice.message} if self.chat else {"text": choice.text}),
            "logprobs": self._logprobs(choice.logprobs, 0) if choice.logprobs else None,
            "finish_reason": choice.finish_reason,
            **({} if choice.stopped_by is None else {"stop_reason": choice.stopped_by}),
        }

    def role_event(self, index: int) -> bytes:
        """The first event of a chat choice: who is speaking."""
        return self.event(index, {"role": "assistant", "content": "", "refusal": None})

    def event(
        self,
        index: int,
        content: str | Mapping[str, Any],
        logprobs: list[TokenLogprob] | None = None,
        offset: int = 0,
    ) -> bytes:
        """What is new of a choice: a chat's delta, or text that follows ``offset`` characters."""
        details = b"null"
        if logprobs:
            details = orjson.dumps(self._logprobs(logprobs, offset))
        return self._chunk(index, content, details, b"null")

    def finish_event(
        self, index: int, reason: FinishReason, stopped_by: str | None = None
    ) -> bytes:
        """The last event of a choice: why it ended, and which stop string ended it if one did."""
        reasons = orjson.dumps(reason)
        if stopped_by is not None:
            reasons += b',"stop_reason":' + orjson.dumps(stopped_by)
        return self._chunk(index, {} if self.chat else "", b"null", reasons)

    def _chunk(
        self, index: int, content: str | Mapping[str, Any], logprobs: bytes, reason: bytes
    ) -> bytes:
        return b'%b%d%b%b,"logprobs":%b,"finish_reason":%b%b' % (
            self._head,
            index,
            self._key,
            orjson.dumps(content),
            logprobs,
            reason,
            self._tail,
        )

    def usage_event(self, usage: Usage, timings: Timings) -> bytes:
        """The event without choices that carries the request's usage."""
        return event(
            {
                **self._chunk_fields,
                "choices": [],
                "usage": usage.to_json(),
                "timings": timings.to_json(),
            }
        )

    def _logprobs(self, tokens: list[TokenLogprob], offset: int) -> dict[str, Any]:
        return _chat_logprobs(tokens) if self.chat else _completion_logprobs(tokens, offset)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", errors="replace")


def _piece_json(piece: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _text(piece), "logprob": logprob, "bytes": list(piece)}


def _chat_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    content = [
        _piece_json(token.piece, token.logprob)
        | {"top_logprobs": [_piece_json(piece, logprob) for piece, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: list[TokenLogprob], offset: int) -> dict[str, Any]:
    texts = [_text(token.piece) for token in tokens]
    offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=offset))
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None
            if token.logprob is None
            else {_text(piece): logprob for piece, logprob in token.top}
            | {_text(token.piece): token.logprob}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def model_json(name: str, created: int, parent: str | None = None) -> dict[str, Any]:
    """An entry of ``GET /v1/models``; the ``parent`` of a LoRA adapter is its base model."""
    entry = {"id": name, "object": "model", "created": created, "owned_by": "rigserve"}
    return entry | ({"parent": parent} if parent else {})
