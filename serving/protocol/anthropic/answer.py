"""A chat completion's answer, its stream and its errors in the words of Anthropic's Messages API."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson

from serving.protocol.requests import ChatCompletionRequest

# Anthropic's names for these; other 4xx are invalid_request_error, 5xx api_error. A 503 says that the
# same request may succeed soon, which clients of that API know as being overloaded.
_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# What errors of chat completions speak of, and what that is called here.
_NAMES = {
    "'reasoning_effort'": "'thinking' (or 'output_config.effort')",
    "'response_format'": "'output_config.format'",
    "'parallel_tool_calls'": "'tool_choice.disable_parallel_tool_use'",
    "'stop'": "'stop_sequences'",
    "'required'": "'any'",
}
# Codes of streams whose engine or server is gone.
_GONE = ("engine_stopped", "remote_broke_off")
_STOP_REASONS = {"tool_calls": "tool_use", "content_filter": "refusal"}


def error_json(status: int, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """The body of an error response; ``error`` is what OpenAI's has under that name."""
    default = "invalid_request_error" if status < 500 else "api_error"
    return _error(_TYPE_BY_STATUS.get(status, default), error, request_id)


def _error(kind: str, error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    message = str(error.get("message"))
    for name, name_here in _NAMES.items():
        message = message.replace(name, name_here)
    if error.get("code") == "context_length_exceeded":
        # Agents know by these words that it is time to shorten the conversation.
        message = f"prompt is too long: {message}"
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }


class MessageTranslation:
    """One request's way back. Its methods are those of the gateway's ``Translation``."""

    def __init__(self, asked: ChatCompletionRequest, request_id: str) -> None:
        self._max_tokens = asked.token_limit
        self._request_id = request_id
        self._blocks = _BlockEvents()
        self._started = False
        self._last_choice: Mapping[str, Any] = {}
        self._usage: Mapping[str, Any] = {}

    def answer(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The message of a chat completion."""
        choice, usage = completion["choices"][0], completion["usage"]
        said = choice["message"]
        content: list[dict[str, Any]] = []
        if thinking := said.get("reasoning_content"):
            content.append({"type": "thinking", "thinking": thinking, "signature": ""})
        if text := said.get("content"):
            content.append({"type": "text", "text": text})
        calls = said.get("tool_calls") or ()
        content += [_tool_use(call, _input(call["function"]["arguments"])) for call in calls]
        return {
            **_message(completion["model"], content),
            **self._stop(choice, usage, called=bool(calls)),
            "usage": {**_usage_json(usage), "service_tier": "standard"},
        }

    def refusal(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        """The body of an error response."""
        return error_json(status, error["error"], self._request_id)

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """The events that a chunk brings. Why the answer ended, and what it used, is told at the end."""
        told = b""
        if not self._started:
            self._started = True
            told = _start(chunk["model"])
        for choice in chunk["choices"]:
            told += self._blocks.add(choice["delta"])
            if choice.get("finish_reason"):
                self._last_choice = choice
        self._usage = chunk.get("usage") or self._usage
        return told

    def failure(self, error: dict[str, Any]) -> bytes:
        """The event that ends a stream in which something went wrong."""
        said = error["error"]
        kind = str(said.get("type"))
        if said.get("code") in _GONE:
            kind = _TYPE_BY_STATUS[503]
        elif not kind.endswith("_error"):
            kind = "api_error"
        return _event(_error(kind, said, self._request_id))

    def end(self) -> bytes:
        """The events that end a stream in the ordinary way."""
        end = {
            "type": "message_delta",
            "delta": self._stop(self._last_choice, self._usage, called=self._blocks.has_calls),
            "usage": _usage_json(self._usage),
        }
        return self._blocks.close() + _event(end) + _event({"type": "message_stop"})

    def _stop(
        self, choice: Mapping[str, Any], usage: Mapping[str, Any], *, called: bool
    ) -> dict[str, Any]:
        """Why the answer ended. Engines that tell which text stopped them do so as vLLM does."""
        finish, matched = choice.get("finish_reason"), choice.get("stop_reason")
        reason = _STOP_REASONS.get(str(finish), "end_turn")
        if finish == "length":
            used, most = usage.get("completion_tokens", 0), self._max_tokens
            at_limit = most is None or used >= most
            reason = "max_tokens" if at_limit else "model_context_window_exceeded"
        elif finish == "stop" and isinstance(matched, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": matched}
        elif finish == "stop" and called:
            # So OpenAI ends a call that was asked for by name.
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": None}


class _BlockEvents:
    """Content blocks in a stream: one is open at a time; what is new belongs to it, or opens the next."""

    def __init__(self) -> None:
        self._count = 0
        # The kind of the open block, or the number of the call that it is.
        self._open: str | int | None = None
        self._called: set[int] = set()

    @property
    def has_calls(self) -> bool:
        """Whether tools were called."""
        return bool(self._called)

    def add(self, delta: Mapping[str, Any]) -> bytes:
        """The events of a chat completion's delta."""
        # A delta does not tell what came first: a call that goes on did, and others come after words.
        calls = delta.get("tool_calls") or ()
        going_on = [call for call in calls if call["index"] == self._open]
        told = b"".join(map(self._arguments, going_on))
        if thinking := delta.get("reasoning_content"):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            told += self._within("thinking", block)
            told += self._delta({"type": "thinking_delta", "thinking": thinking})
        if text := delta.get("content"):
            told += self._within("text", {"type": "text", "text": ""})
            told += self._delta({"type": "text_delta", "text": text})
        for call in calls:
            if call in going_on:
                continue
            if call["index"] not in self._called:
                self._called.add(call["index"])
                told += self._within(call["index"], _tool_use(call, {}))
            told += self._arguments(call)
        return told

    def close(self) -> bytes:
        """The event that ends the open block, if there is one."""
        if self._open is None:
            return b""
        self._open = None
        return _event({"type": "content_block_stop", "index": self._count - 1})

    def _within(self, which: str | int, block: dict[str, Any]) -> bytes:
        """The events after which the block is open."""
        if self._open == which:
            return b""
        told = self.close()
        self._open = which
        self._count += 1
        start = {"type": "content_block_start", "index": self._count - 1, "content_block": block}
        return told + _event(start)

    def _arguments(self, call: Mapping[str, Any]) -> bytes:
        arguments = call["function"].get("arguments")
        if not arguments:
            return b""
        return self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._count - 1, "delta": delta})


def _event(payload: dict[str, Any]) -> bytes:
    """An event by the name of its payload's type."""
    return b"event: %b\ndata: %b\n\n" % (payload["type"].encode(), orjson.dumps(payload))


def _start(model: str) -> bytes:
    """The event that begins a message; what it will have used is not known yet."""
    message = {
        **_message(model, []),
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**_usage_json({}), "service_tier": "standard"},
    }
    return _event({"type": "message_start", "message": message})


def _message(model: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
    }


def _tool_use(call: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call["id"],
        "name": call["function"]["name"],
        "input": given,
    }


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments; those that are no JSON object, in the wrapping that Anthropic's guide has for them."""
    try:
        given = orjson.loads(arguments or "{}")
    except ValueError:
        given = None
    return given if isinstance(given, dict) else {"INVALID_JSON": arguments}


def _usage_json(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens as Anthropic counts them: what was found in the cache is no input beside it."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage.get("prompt_tokens", 0) - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens", 0),
    }
