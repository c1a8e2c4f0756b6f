"""Response bodies and stream chunks, as plain dictionaries ready for JSON."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]


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
    """One generated token and what the model thought of it. ``top`` holds (piece, logprob) pairs."""

    piece: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


@dataclass(slots=True)
class Choice:
    """One completion, gathered from its deltas."""

    index: int
    text: str = ""
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


def new_id(prefix: str) -> str:
    """A fresh identifier such as ``chatcmpl-…``."""
    return f"{prefix}-{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every body and chunk of one response repeats.

    ``chat`` tells chat completions from text completions; ``usage_in_chunks`` is set when the client
    asked for usage, as OpenAI then puts ``"usage": null`` into every other chunk.
    """

    chat: bool
    model: str
    system_fingerprint: str
    usage_in_chunks: bool = False
    id: str = ""
    created: int = 0

    @staticmethod
    def create(
        *, chat: bool, model: str, system_fingerprint: str, usage_in_chunks: bool = False
    ) -> Envelope:
        """A new response's envelope, with a fresh id and the current time."""
        response_id = new_id("chatcmpl" if chat else "cmpl")
        return Envelope(
            chat, model, system_fingerprint, usage_in_chunks, response_id, int(time.time())
        )

    def _with(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }

    def body(self, choices: Iterable[Choice], usage: Usage, timings: Timings) -> dict[str, Any]:
        """The whole response, for a request that does not stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        body = self._with(kind, [self._whole_choice(choice) for choice in choices])
        return body | {"usage": usage.to_json(), "timings": timings.to_json()}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        logprobs = self._logprobs(choice.logprobs, 0) if choice.logprobs else None
        content: Mapping[str, Any]
        if self.chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            content = {"message": message}
        else:
            content = {"text": choice.text}
        return {
            "index": choice.index,
            **content,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }

    def role_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat choice: who is speaking."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk(
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        )

    def text_chunk(
        self, index: int, text: str, logprobs: list[TokenLogprob], offset: int
    ) -> dict[str, Any]:
        """Text that follows ``offset`` characters, with its tokens' log-probabilities if there are any."""
        return self._chunk(
            {
                "index": index,
                **({"delta": {"content": text}} if self.chat else {"text": text}),
                "logprobs": self._logprobs(logprobs, offset) if logprobs else None,
                "finish_reason": None,
            }
        )

    def finish_chunk(self, index: int, reason: FinishReason) -> dict[str, Any]:
        """The last chunk of a choice: why it ended."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk({"index": index, **content, "logprobs": None, "finish_reason": reason})

    def usage_chunk(self, usage: Usage, timings: Timings) -> dict[str, Any]:
        """The chunk without choices that carries the request's usage."""
        chunk = self._with(self._chunk_kind, [])
        return chunk | {"usage": usage.to_json(), "timings": timings.to_json()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = self._with(self._chunk_kind, [choice])
        if self.usage_in_chunks:
            chunk["usage"] = None
        return chunk

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _logprobs(self, tokens: list[TokenLogprob], offset: int) -> dict[str, Any]:
        return _chat_logprobs(tokens) if self.chat else _completion_logprobs(tokens, offset)


def _piece_json(piece: bytes, logprob: float) -> dict[str, Any]:
    text = piece.decode("utf-8", errors="replace")
    return {"token": text, "logprob": logprob, "bytes": list(piece)}


def _chat_logprobs(tokens: list[TokenLogprob]) -> dict[str, Any]:
    content = [
        _piece_json(token.piece, token.logprob)
        | {"top_logprobs": [_piece_json(piece, logprob) for piece, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: list[TokenLogprob], offset: int) -> dict[str, Any]:
    texts = [token.piece.decode("utf-8", errors="replace") for token in tokens]
    offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=offset))
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {piece.decode("utf-8", errors="replace"): logprob for piece, logprob in token.top}
            for token in tokens
        ],
        "text_offset": offsets,
    }


def model_json(name: str, created: int) -> dict[str, Any]:
    """An entry of ``GET /v1/models``."""
    return {"id": name, "object": "model", "created": created, "owned_by": "rigserve"}
