"""Given `rigserve serve`, what users of the official Anthropic SDK see."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
import requests
from anthropic.types import Message

from tests.processes import RigServer, wait_for, write_config
from tests.thinking import SHOWN, TEMPLATE, with_template

MODEL = "smollm2-135m"
# Anthropic's newest models take no temperature, and their SDK has no such argument any more.
GREEDY = {"temperature": 0}
HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "London"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def client_of(rig: RigServer, max_retries: int = 0) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=rig.base_url, api_key="unused", max_retries=max_retries)


@pytest.fixture(scope="module")
def client(rig: RigServer) -> anthropic.Anthropic:
    """An SDK client that does not retry."""
    return client_of(rig)


@pytest.fixture(scope="module")
def thinker(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, model_path: Path
) -> Iterator[RigServer]:
    """A server, not ready yet, whose model's template opens a reasoning block."""
    folder = tmp_path_factory.mktemp("thinker")
    source = with_template(model_path, TEMPLATE, folder / "model.gguf")
    config = write_config(folder, cache_dir, source=str(source), quantization=None)
    with RigServer(config) as server:
        wait_for(lambda: server.answers("/health"), "the gateway answers")
        yield server


def ask(client: anthropic.Anthropic, **fields: Any) -> Message:
    fields = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "extra_body": GREEDY} | fields
    answer = client.messages.with_raw_response.create(**fields)
    # The SDK takes what it gets; its types, read strictly, do not.
    Message.model_validate_json(answer.text(), strict=True)
    message: Message = answer.parse()
    return message


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_requests_wait_while_their_model_loads_unless_they_may_not(thinker: RigServer) -> None:
    hasty = client_of(thinker).with_options(default_headers={"x-rigserve-deadline-seconds": "0.1"})
    with pytest.raises(anthropic.ServiceUnavailableError) as loading:
        ask(hasty, messages=SHOWN_TURNS)
    assert loading.value.type == "overloaded_error"
    assert int(loading.value.response.headers["retry-after"]) >= 1
    assert ask(client_of(thinker), messages=SHOWN_TURNS).content


def test_a_whole_answer(client: anthropic.Anthropic) -> None:
    message = ask(client)
    assert (message.model, message.role, message.stop_reason) == (MODEL, "assistant", "max_tokens")
    assert message.id.startswith("msg_")
    assert message._request_id
    assert text_of(message)
    assert message.usage.output_tokens == 8


def test_a_stream_says_the_same(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    with client.messages.stream(
        model=MODEL, messages=HELLO, max_tokens=8, extra_body=GREEDY
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == text_of(message) == text_of(whole)
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert usage.output_tokens == 8
    read = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert read == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


def test_the_events_of_a_stream(client: anthropic.Anthropic) -> None:
    stream = client.messages.create(model=MODEL, messages=HELLO, max_tokens=3, stream=True)
    kinds = [event.type for event in stream]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_async_client_streams(rig: RigServer) -> None:
    async def main() -> Message:
        async with (
            anthropic.AsyncAnthropic(base_url=rig.base_url, api_key="-") as client,
            client.messages.stream(model=MODEL, messages=HELLO, max_tokens=4) as stream,
        ):
            return await stream.get_final_message()

    assert asyncio.run(main()).usage.output_tokens == 4


def test_prefixes_are_found_again_and_counted_apart(client: anthropic.Anthropic) -> None:
    fields: Any = {
        "system": [
            {
                "type": "text",
                "text": "You know all about whales. " * 4,
                "cache_control": {"type": "ephemeral"},
            }
        ]
    }
    first = ask(client, **fields).usage
    again = ask(client, **fields).usage
    assert again.cache_read_input_tokens
    assert first.cache_read_input_tokens is not None
    tokens = client.messages.count_tokens(model=MODEL, messages=HELLO, **fields).input_tokens
    for usage in (first, again):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == tokens


def test_a_conversation_with_a_tool(client: anthropic.Anthropic) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    fields: Any = {"tools": [WEATHER], "max_tokens": 60, "messages": [question]}
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    message = ask(client, tool_choice=one, **fields)
    assert message.stop_reason == "tool_use"
    [call] = message.content
    assert call.type == "tool_use"
    assert call.name == "get_weather"
    assert call.input["city"] in ("Paris", "London")
    with client.messages.stream(
        model=MODEL,
        extra_body=GREEDY,
        tool_choice={"type": "tool", "name": "get_weather"},
        **fields,
    ) as stream:
        [streamed] = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input["city"] in ("Paris", "London")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "17 degrees"}
    fields["messages"] = [
        question,
        message.to_param(),
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    answer = ask(client, tool_choice={"type": "none"}, **fields)
    assert text_of(answer)
    counted = client.messages.count_tokens(
        model=MODEL,
        tools=fields["tools"],
        messages=fields["messages"],
        tool_choice={"type": "none"},
    )
    usage = answer.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


def test_an_output_format_is_kept_to(client: anthropic.Anthropic) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    message = ask(
        client,
        max_tokens=40,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert text_of(message).replace(" ", "") in ('{"sure":true}', '{"sure":false}')


def test_the_sequence_that_stopped_an_answer_is_named(client: anthropic.Anthropic) -> None:
    said = text_of(ask(client, max_tokens=30))
    stop = said.split()[6]
    fields: Any = {"max_tokens": 30, "stop_sequences": ["no such text", stop]}
    message = ask(client, **fields)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == said[: said.index(stop)]
    with client.messages.stream(model=MODEL, messages=HELLO, extra_body=GREEDY, **fields) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", stop)
    assert text_of(streamed) == text_of(message)


def test_a_full_context_is_told_from_a_limit(client: anthropic.Anthropic) -> None:
    endless = {"type": "array", "items": {"type": "boolean"}, "minItems": 300}
    message = ask(
        client,
        messages=[{"role": "user", "content": "sea " * 400}],
        max_tokens=400,
        output_config={"format": {"type": "json_schema", "schema": endless}},
    )
    assert message.stop_reason == "model_context_window_exceeded"


# What the engine's tests show the model, so that it closes its reasoning.
SHOWN_TURNS: Any = [
    {
        "role": turn["role"],
        "content": [
            *(
                [{"type": "thinking", "thinking": turn["reasoning_content"], "signature": ""}]
                if "reasoning_content" in turn
                else []
            ),
            {"type": "text", "text": turn["content"]},
        ],
    }
    for turn in SHOWN
]


def test_thinking_is_a_block_of_its_own(thinker: RigServer) -> None:
    thinker.wait_until_ready()
    client = client_of(thinker)
    message = ask(client, messages=SHOWN_TURNS, max_tokens=40)
    assert [block.type for block in message.content] == ["thinking", "text"]
    with client.messages.stream(
        model=MODEL, messages=SHOWN_TURNS, max_tokens=40, extra_body=GREEDY
    ) as stream:
        streamed = stream.get_final_message()
    assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in message.content]
    silent = ask(client, messages=SHOWN_TURNS, max_tokens=40, thinking={"type": "disabled"})
    assert [block.type for block in silent.content] == ["text"]


def test_errors_are_the_sdks_exceptions(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="smollm2-135m") as not_found:
        ask(client, model="smollm2-135")
    assert not_found.value.type == "not_found_error"
    assert not_found.value.request_id
    for fields, match in (
        ({"extra_body": {"temperature": 2}}, "temperature"),
        ({"speed": "fast"}, "speed"),
        ({"messages": [{"role": "user", "content": "sea " * 600}]}, "prompt is too long"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "'thinking'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search"),
    ):
        with pytest.raises(anthropic.BadRequestError, match=match) as bad:
            ask(client, **fields)
        assert bad.value.type == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(
            model=MODEL,
            max_tokens=8,
            messages=[{"role": "user", "content": "sea " * 600}],
            stream=True,
        )
    image: Any = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    turn: Any = {"role": "user", "content": [{"type": "image", "source": image}]}
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        ask(client, messages=[turn])
    with pytest.raises(anthropic.BadRequestError, match="images"):
        client.messages.count_tokens(model=MODEL, messages=[turn])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="nope", messages=HELLO)
    with pytest.raises(anthropic.NotFoundError, match="/v1/batches"):
        client.messages.batches.list()


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("GET", "", b"", 405, "invalid_request_error"),
        ("PUT", "/count_tokens", b"", 405, "invalid_request_error"),
        ("POST", "/nowhere", b"", 404, "not_found_error"),
        ("POST", "", b"{", 400, "invalid_request_error"),
        ("POST", "", b'{"model": "\\ud800"}', 400, "invalid_request_error"),
        ("POST", "", b'{"a": ' * 5000, 400, "invalid_request_error"),
        ("POST", "", b"[1e999]", 400, "invalid_request_error"),
        ("POST", "/count_tokens", b"null", 400, "invalid_request_error"),
        ("POST", "", b"x" * 11_000_000, 413, "request_too_large"),
    ],
)
def test_bad_requests_get_anthropics_error_shape(
    rig: RigServer, method: str, path: str, body: bytes, status: int, kind: str
) -> None:
    url = f"{rig.base_url}/v1/messages{path}"
    answer = requests.request(method, url, data=body, timeout=30)
    assert answer.status_code == status
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", kind)
    assert told["error"]["message"]
    assert told["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_every_token_is_in_the_ledger(rig: RigServer, client: anthropic.Anthropic) -> None:
    message = ask(client, metadata={"user_id": "ann"})
    with client.messages.stream(
        model=MODEL, messages=HELLO, max_tokens=100_000, metadata={"user_id": "bob"}
    ) as stream:
        next(iter(stream.text_stream))

    def rows() -> list[Any]:
        with sqlite3.connect(rig.ledger_path) as connection:
            return connection.execute(
                "SELECT user, status, prompt_tokens, completion_tokens FROM usage"
                " WHERE user IN ('ann', 'bob') AND endpoint = '/v1/messages' ORDER BY user"
            ).fetchall()

    wait_for(lambda: len(rows()) == 2, "the rows")
    usage = message.usage
    tokens = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert rows()[0] == ("ann", 200, tokens, 8)
    assert rows()[1][:3] == ("bob", 499, tokens)


def test_the_list_of_models_stays_openais(rig: RigServer) -> None:
    headers = {"x-api-key": "unused", "anthropic-version": "2023-06-01"}
    assert rig.get("/v1/models", headers=headers).json()["object"] == "list"


def test_an_engine_that_dies_ends_a_stream_with_an_error(thinker: RigServer) -> None:
    thinker.wait_until_ready()
    stream = client_of(thinker).messages.create(
        model=MODEL, messages=SHOWN_TURNS, max_tokens=400, stream=True
    )
    next(iter(stream))
    [engine] = thinker.engines()
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(anthropic.APIStatusError, match="stopped while it worked") as broken:
        for _ in stream:
            pass
    assert broken.value.type == "overloaded_error"
