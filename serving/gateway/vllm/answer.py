"""vLLM's answers in the words of our own engines."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from serving.config import VllmModel
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
_RETRY_AFTER_SECONDS = 2
_TOO_LONG = ("maximum context length", "cannot be greater than max_model_len", "is too long")
# What vLLM says, the field that it is about, and what is to be done where clients cannot do it.
_ABOUT: tuple[tuple[str, str, str], ...] = (
    ("is not a multimodal model", "messages", "The model sees no images."),
    (
        "--tool-call-parser",
        "tools",
        "vLLM knows no way to read this model's tool calls; its config can name one (tool_parser).",
    ),
    ("when using greedy sampling", "n", ""),
    ("matryoshka", "dimensions", ""),
    ("dimensions", "dimensions", ""),
    ("out of vocabulary", "prompt", ""),
)


def fingerprint_of(model: VllmModel) -> str:
    """Changes with the model's config. vLLM's own is told at the end of a stream only, and is to be in all of it."""
    return f"vllm-{hashlib.sha256(model.model_dump_json().encode()).hexdigest()[:12]}"


def refusal(
    model: VllmModel, asked: ModelRequest, status: int, body: Mapping[str, Any]
) -> ApiError:
    """An error response as an exception; one that says nothing was done for the request is :class:`NotStarted`."""
    error = body.get("error")
    told: Mapping[str, Any] = error if isinstance(error, dict) else body
    message = str(told.get("message") or f"The engine of '{model.served_name}' answers {status}.")
    if status == 404:
        return NotStarted(
            400,
            f"The model '{model.served_name}' cannot be asked this: it has no {asked.path}.",
            param="model",
            code=UNSUPPORTED_PARAMETER,
        )
    if any(sign in message for sign in _TOO_LONG):
        return NotStarted(400, message, param=_text_field(asked), code="context_length_exceeded")
    if status == 503:
        return NotStarted(
            503, message, code="model_not_ready", retry_after_seconds=_RETRY_AFTER_SECONDS
        )
    if status >= 500:
        return ApiError(500, message, code="engine_failed")
    for sign, param, mend in _ABOUT:
        if sign in message and param in type(asked).model_fields:
            return NotStarted(400, mend or message, param=param, code=UNSUPPORTED_PARAMETER)
    return NotStarted(400, message, param=_param(asked, told), code="invalid_value")


def _param(asked: ModelRequest, told: Mapping[str, Any]) -> str | None:
    """The field that an error is about, if it is one of the request's."""
    named = told.get("param")
    if isinstance(named, str) and named.partition(".")[0] in type(asked).model_fields:
        return named
    constraint = asked.constraint if isinstance(asked, GenerationRequest) else None
    is_of_form = any(word in str(told.get("message")) for word in ("rammar", "schema", "regex"))
    return constraint.param if constraint and is_of_form else None


def whole(model: VllmModel, asked: ModelRequest, body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer; what it used comes last in it, where it is looked for."""
    if isinstance(asked, TokenizeRequest | DetokenizeRequest):
        return body
    usage = usage_of(body["usage"]).to_json()
    if isinstance(asked, GenerationRequest):
        told = {
            **{name: body[name] for name in ("id", "object", "created")},
            "model": asked.model,
            "choices": [_whole_choice(asked, choice) for choice in body["choices"]],
            "system_fingerprint": fingerprint_of(model),
        }
    elif isinstance(asked, RerankRequest):
        told = {
            "id": new_id("rerank"),
            "model": asked.model,
            "results": [rerank_result(asked, each) for each in body["results"]],
        }
    else:
        told = {"object": "list", "model": asked.model, "data": body["data"]}
        usage = {name: usage[name] for name in ("prompt_tokens", "total_tokens")}
    timings = seconds(body.get("metrics"))
    return {**told, "usage": usage, **({"timings": timings} if timings else {})}


def usage_of(told: Mapping[str, Any]) -> Usage:
    """What a request has used."""
    details = told.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=told["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
        completion_tokens=told.get("completion_tokens") or 0,
    )


def seconds(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """What vLLM measured of a request: not its share of steps with others. Nothing of several answers together."""
    told = metrics or {}
    names = {
        "queue_seconds": "queue_time_ms",
        "prefill_seconds": "time_to_first_token_ms",
        "decode_seconds": "generation_time_ms",
    }
    if any(told.get(name) is None for name in names.values()):
        return {}
    return {ours: max(told[name], 0.0) / _MILLISECONDS for ours, name in names.items()}


class Events(CanonicalEvents):
    """A stream of vLLM's as the gateway reads those of its own engines."""

    def __init__(self, model: VllmModel, asked: GenerationRequest) -> None:
        super().__init__()
        self._asked = asked
        self._fingerprint = fingerprint_of(model)
        # What was last said of the work so far, by choice.
        self._so_far: dict[int, Usage] = {}
        # The choices that have called tools.
        self._calling: set[int] = set()

    def so_far(self) -> bytes:
        """The event that would have ended a stream which is broken off now; nothing if nothing is known."""
        if not self._so_far:
            return b""
        first_of_prompts = self._asked.choices if isinstance(self._asked, CompletionRequest) else 0
        prompts = {
            index // first_of_prompts if first_of_prompts else 0: usage.prompt_tokens
            for index, usage in self._so_far.items()
        }
        usage = Usage(
            prompt_tokens=sum(prompts.values()),
            cached_tokens=0,
            completion_tokens=sum(each.completion_tokens for each in self._so_far.values()),
        )
        return event({"choices": [], "usage": usage.to_json()})

    def error(self, told: Any) -> Any:
        """An error that broke off the stream."""
        message = told.get("message") if isinstance(told, dict) else told
        return ApiError(500, str(message), code="engine_failed").body["error"]

    def revise(self, chunk: dict[str, Any]) -> None:
        """Bring one chunk into form."""
        usage, metrics = chunk.pop("usage", None), chunk.pop("metrics", None)
        choices = chunk.get("choices") or []
        told = {
            **{name: chunk.get(name) for name in ("id", "object", "created")},
            "model": self._asked.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }
        chunk.clear()
        chunk |= told
        if choices and isinstance(usage, dict):
            self._so_far[choices[0].get("index", 0)] = usage_of(usage)
        elif isinstance(usage, dict):
            chunk["usage"] = usage_of(usage).to_json()
            if timings := seconds(metrics):
                chunk["timings"] = timings
        for choice in choices:
            _revise_chunk(self._asked, choice)
            if choice.get("delta", {}).get("tool_calls"):
                self._calling.add(choice["index"])
            # vLLM says "stop" of a call that it was told to make.
            if choice["finish_reason"] == "stop" and choice["index"] in self._calling:
                choice["finish_reason"] = "tool_calls"
        if self._asked.wants_usage_chunk:
            chunk.setdefault("usage", None)

    def parts(self, chunk: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """The last text and the reason of the end are two chunks; a chunk without text is none."""
        [*choices] = chunk["choices"]
        if len(choices) != 1:
            yield chunk
            return
        [choice] = choices
        content = choice.get("delta", choice.get("text"))
        reason = choice["finish_reason"]
        if content or choice["logprobs"]:
            said = {
                name: value
                for name, value in choice.items()
                if name not in ("finish_reason", "stop_reason")
            }
            yield {**chunk, "choices": [{**said, "finish_reason": None}]}
        if reason is not None:
            nothing: Any = {"delta": {}} if "delta" in choice else {"text": ""}
            end = {name: value for name, value in choice.items() if name not in ("delta", "text")}
            yield {**chunk, "choices": [{**end, **nothing, "logprobs": None}]}


def _text_field(asked: ModelRequest) -> str:
    names = ("messages", "prompt", "input", "documents")
    return next(name for name in names if name in type(asked).model_fields)


def _whole_choice(asked: GenerationRequest, choice: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"index": choice["index"]}
    reason = choice["finish_reason"]
    if isinstance(asked, ChatCompletionRequest):
        message = choice["message"]
        calls = [_call(call) for call in message.get("tool_calls") or ()]
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        instead = {
            **({"reasoning_content": reasoning} if reasoning else {}),
            **({"tool_calls": calls} if calls else {}),
        }
        content = message.get("content") or (None if instead else "")
        told["message"] = {"role": "assistant", "content": content, "refusal": None, **instead}
        reason = "tool_calls" if calls and reason == "stop" else reason
    else:
        told["text"] = choice["text"]
    told |= {"logprobs": _logprobs(asked, choice.get("logprobs")), "finish_reason": reason}
    if isinstance(choice.get("stop_reason"), str):
        told["stop_reason"] = choice["stop_reason"]
    return told


def _revise_chunk(asked: GenerationRequest, choice: dict[str, Any]) -> None:
    """Bring a chunk's choice into form."""
    told: dict[str, Any] = {"index": choice["index"]}
    if isinstance(asked, ChatCompletionRequest):
        delta = choice["delta"]
        if delta.get("role"):
            # By the order of these the gateway tells it from generated text.
            told["delta"] = {"role": delta["role"], "content": "", "refusal": None}
        else:
            told["delta"] = {
                **({"content": text} if (text := delta.get("content")) else {}),
                **({"reasoning_content": text} if (text := delta.get("reasoning")) else {}),
                **({"tool_calls": calls} if (calls := _deltas(delta)) else {}),
            }
    else:
        told["text"] = choice["text"]
    told["logprobs"] = _logprobs(asked, choice.get("logprobs"))
    told["finish_reason"] = choice.get("finish_reason")
    if isinstance(choice.get("stop_reason"), str):
        told["stop_reason"] = choice["stop_reason"]
    choice.clear()
    choice |= told


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": call.get("id") or new_id("call"),
        "type": "function",
        "function": {"name": function["name"], "arguments": function["arguments"]},
    }


def _deltas(delta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is new of calls; the first of each has an id and a name, the others have not."""
    told = []
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        arguments = function.get("arguments") or ""
        if function.get("name"):
            begun = {"name": function["name"], "arguments": arguments}
            told.append(
                {
                    "index": call["index"],
                    "id": call.get("id") or new_id("call"),
                    "type": "function",
                    "function": begun,
                }
            )
        elif arguments:
            told.append({"index": call["index"], "function": {"arguments": arguments}})
    return told


def _logprobs(asked: GenerationRequest, told: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not told:
        return None
    if isinstance(asked, ChatCompletionRequest):
        return {"content": told["content"], "refusal": None} if told["content"] else None
    return {
        name: told[name] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
