"""The Response object: how it begins, and the ways it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import orjson

from serving.protocol.openai_responses.items import item_id
from serving.protocol.openai_responses.request import ResponseRequest
from serving.protocol.requests import ChatCompletionRequest

ItemStatus = Literal["in_progress", "completed", "incomplete"]

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ERROR_CODES = {
    "rate_limit_error": "rate_limit_exceeded",
    "invalid_request_error": "invalid_prompt",
}


def begun(request: ResponseRequest, asked: ChatCompletionRequest, model: str) -> dict[str, Any]:
    """A response in progress: a fresh id, what was asked for, and no output yet.

    ``asked`` is the chat completion that it comes to: what the config sets for a model is in there. What
    the model's own defaults decide is null.
    """
    # As orjson can write it: what has more than 64 bits becomes a float, as it does in JavaScript.
    told: dict[str, Any] = orjson.loads(request.model_dump_json(by_alias=True, exclude={"input"}))
    tools = told["tools"] or []
    reasoning, text = told["reasoning"] or {}, told["text"] or {}
    form = text.get("format") or {"type": "text"}
    return {
        "id": item_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": request.background is True,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": asked.token_limit,
        "max_tool_calls": None,
        "metadata": told["metadata"] or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": asked.service_tier or "default",
        "safety_identifier": request.safety_identifier,
        "store": request.is_stored,
        "temperature": asked.temperature,
        "text": {
            "format": {name: value for name, value in form.items() if value is not None},
            "verbosity": "medium",
        },
        "tool_choice": told["tool_choice"] or "auto",
        "tools": [
            {name: tool[name] for name in ("type", "name", "description", "parameters", "strict")}
            for tool in tools
        ],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": asked.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": request.user,
    }


def finished(
    response: Mapping[str, Any],
    output: Sequence[Mapping[str, Any]],
    finish_reason: str | None,
    completion: Mapping[str, Any],
) -> dict[str, Any]:
    """The response with its output; ``completion`` holds usage and tier, ``finish_reason`` says why it ended."""
    cut_short = _INCOMPLETE.get(finish_reason or "")
    return {
        **response,
        "status": "incomplete" if cut_short else "completed",
        "completed_at": None if cut_short else int(time.time()),
        "incomplete_details": {"reason": cut_short} if cut_short else None,
        "output": output,
        "service_tier": completion.get("service_tier") or "default",
        "usage": _usage(completion.get("usage"), output),
    }


def failed(
    response: Mapping[str, Any], output: Sequence[Mapping[str, Any]], error: Mapping[str, Any]
) -> dict[str, Any]:
    """The response with what there is of its output, and the ``error`` (OpenAI's) that ended it."""
    return {
        **response,
        "status": "failed",
        "output": output,
        "error": {
            "code": _ERROR_CODES.get(error.get("type") or "", "server_error"),
            "message": error.get("message") or "The engine failed.",
            "param": error.get("param"),
            "type": error.get("type"),
        },
    }


def message_item(
    identifier: str, parts: list[dict[str, Any]], status: ItemStatus
) -> dict[str, Any]:
    """An answer in words."""
    return {
        "id": identifier,
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": parts,
    }


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The words themselves."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def reasoning_item(
    identifier: str, parts: list[dict[str, Any]], status: ItemStatus
) -> dict[str, Any]:
    """What the model thought."""
    return {
        "id": identifier,
        "type": "reasoning",
        "summary": [],
        "content": parts,
        "status": status,
    }


def reasoning_part(text: str) -> dict[str, Any]:
    """The thoughts themselves."""
    return {"type": "reasoning_text", "text": text}


def call_item(
    identifier: str, call_id: str, name: str, arguments: str, status: ItemStatus
) -> dict[str, Any]:
    """A function's call."""
    return {
        "id": identifier,
        "type": "function_call",
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
        "status": status,
    }


def output_of(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The output items that a whole chat completion's choice amounts to."""
    message = choice["message"]
    reasoning, text = message.get("reasoning_content"), message.get("content")
    calls = message.get("tool_calls") or []
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    output = []
    if reasoning:
        output.append(reasoning_item(item_id("rs"), [reasoning_part(reasoning)], "completed"))
    if text or not (reasoning or calls):
        text = text or ""
        part = text_part(text, tokens_of(text, logprobs))
        output.append(message_item(item_id("msg"), [part], "completed"))
    output += [
        call_item(
            item_id("fc"),
            call["id"],
            call["function"]["name"],
            call["function"]["arguments"],
            "completed",
        )
        for call in calls
    ]
    if choice["finish_reason"] in _INCOMPLETE:
        output[-1]["status"] = "incomplete"
    return output


def tokens_of(text: str, tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of an answer's ``tokens`` that ``text``, a part of it, was made of."""
    pieces = [bytes(token.get("bytes") or ()) for token in tokens]
    begin = b"".join(pieces).rfind(text.encode())
    end = begin + len(text.encode())
    chosen, at = [], 0
    for token, piece in zip(tokens, pieces, strict=True):
        if begin >= 0 and at < end and at + len(piece) > begin:
            chosen.append(token)
        at += len(piece)
    return chosen


def _usage(
    usage: Mapping[str, Any] | None, output: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    if usage is None:
        return None
    tokens = usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        # Nothing is written to a cache that is paid for: there is only the one that is always there.
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": _output_details(usage, tokens, output),
        "total_tokens": usage["prompt_tokens"] + tokens,
    }


def _output_details(
    usage: Mapping[str, Any], tokens: int, output: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Reasoning's tokens as the engine counts them; if it does not, their share of what was written."""
    counted = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    if counted is not None:
        return {"reasoning_tokens": counted}
    thought = said = 0
    for item in output:
        if item["type"] == "function_call":
            said += len(item["name"]) + len(item["arguments"])
            continue
        length = sum(len(part["text"]) for part in item["content"])
        if item["type"] == "reasoning":
            thought += length
        else:
            said += length
    if not thought or not said:
        return {"reasoning_tokens": tokens if thought else 0}
    return {"reasoning_tokens": round(tokens * thought / (thought + said)), "estimated": True}
