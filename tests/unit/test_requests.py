"""A request field is honoured, or refused with a 400 that names it."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest

from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields: Any) -> Any:
    return ChatCompletionRequest.parse(json.dumps(HELLO | fields).encode())


def refusal(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ChatCompletionRequest.parse(body)
    assert caught.value.status == 400
    return caught.value


def test_fields_are_read() -> None:
    request = chat(stop="x", max_completion_tokens=5, n=2, logprobs=True, temperature=1, top_k=None)
    assert request.stop_strings == ("x",)
    assert request.token_limit == 5
    assert request.choices == 2
    assert request.top_logprob_count == 0
    assert request.temperature == 1.0


def test_what_an_answer_says_nothing_with_may_be_sent_back() -> None:
    answer: Any = {"role": "assistant", "content": "a", "refusal": None, "tool_calls": []}
    assert chat(messages=[answer]).messages[0].text == "a"


def test_what_sdks_parsed_of_an_answer_may_be_sent_back() -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {}}
    call = {"id": "1", "type": "function", "function": function}
    answer: Any = {"role": "assistant", "content": "[]", "parsed": [], "tool_calls": [call]}
    sent = chat(messages=[answer]).model_dump(exclude_none=True)["messages"][0]
    del answer["parsed"], function["parsed_arguments"]
    assert sent == answer


def test_the_error_is_that_of_the_form_that_came_closest() -> None:
    body = json.dumps({"model": "m", "prompt": [[1], [2, "x"]]}).encode()
    with pytest.raises(ApiError, match="should be a valid integer") as caught:
        CompletionRequest.parse(body)
    assert caught.value.param == "prompt[1][1]"


@pytest.mark.parametrize("field", ["messages", "tools", "stop"])
def test_millions_of_errors_take_no_longer_than_one(field: str) -> None:
    started = time.process_time()
    refusal(orjson.dumps(HELLO | {field: [0] * 1_000_000}))
    assert time.process_time() - started < 1


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "ab"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "hi", "mood": 1}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]},
            "messages[0].refusal",
        ),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"store": True}, "store"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refusal(json.dumps(HELLO | fields).encode())
    assert error.param is not None
    assert (
        error.param.startswith(param.split(".")[0])
        if param == "logit_bias.1"
        else error.param == param
    )
    assert param.split(".")[0].split("[")[0] in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": None},
        {"tools": []},
        {"store": False},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).model == "m"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model":"\\ud800"}',
        b"[" * 10_000,
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    assert refusal(body).code in ("invalid_json", "invalid_value", "missing_required_parameter")


def test_missing_fields_are_named() -> None:
    assert refusal(b'{"model":"m"}').param == "messages"
    assert refusal(b'{"messages":[{"role":"user","content":"x"}]}').param == "model"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: list[Any]) -> None:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert CompletionRequest.parse(body).prompts == prompts
    assert CompletionRequest.parse(body).token_limit == 16


@pytest.mark.parametrize("prompt", [[], [[]], {}, 5, None, [1, "a"]])
def test_a_bad_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        CompletionRequest.parse(json.dumps({"model": "m", "prompt": prompt}).encode())
    assert caught.value.param is not None
    assert caught.value.param.startswith("prompt")


@pytest.mark.parametrize("field", ["echo", "best_of"])
def test_wrong_and_unsupported_completion_fields_are_refused_by_name(field: str) -> None:
    with pytest.raises(ApiError) as caught:
        CompletionRequest.parse(json.dumps({"model": "m", "prompt": "a", field: "yes"}).encode())
    assert caught.value.param == field
