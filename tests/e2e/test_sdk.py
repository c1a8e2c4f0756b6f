"""Given `rigserve serve`, what users of the official OpenAI SDK see."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import openai
import pytest
import requests

from tests.processes import RigServer, wait_for

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]


def test_a_whole_answer(rig: RigServer) -> None:
    answer = rig.client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, max_tokens=8, temperature=0
    )
    assert answer.model == "smollm2-135m"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_an_answer_can_be_sent_back_as_it_came(rig: RigServer) -> None:
    create: Any = rig.client.chat.completions.create
    message = create(model="smollm2-135m", messages=HELLO, max_tokens=4).choices[0].message
    for turn in (message, message.model_dump()):
        question = {"role": "user", "content": "Go on."}
        answer = create(model="smollm2-135m", messages=[*HELLO, turn, question], max_tokens=4)
        assert answer.usage.completion_tokens == 4


def test_a_stream(rig: RigServer) -> None:
    stream = rig.client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, max_tokens=8, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_with_usage(rig: RigServer) -> None:
    stream = rig.client.chat.completions.create(
        model="smollm2-135m",
        messages=HELLO,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_the_async_client_runs_streams_side_by_side(rig: RigServer) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{rig.base_url}/v1", api_key="-") as client:

            async def one(number: int) -> str:
                stream = await client.chat.completions.create(
                    model="gpt-4o-mini",
                    messages=[{"role": "user", "content": f"Number {number}?"}],
                    max_tokens=8,
                    stream=True,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(number) for number in range(8)))

    assert all(asyncio.run(main()))


def test_a_conversation_with_a_tool(rig: RigServer) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "London"]}, "unit": {"enum": ["C", None]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    create: Any = rig.client.chat.completions.create
    fields = {"model": "smollm2-135m", "tools": [tool], "parallel_tool_calls": False}
    question = {"role": "user", "content": "What is the weather in Paris?"}
    chunks = list(create(messages=[question], tool_choice="required", stream=True, **fields))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    answer = create(
        messages=[question],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        **fields,
    )
    message = answer.choices[0].message
    arguments = json.loads(message.tool_calls[0].function.arguments)
    assert arguments["city"] in ("Paris", "London")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "17 degrees"}
    answer = create(messages=[question, message, result], tool_choice="none", **fields)
    assert answer.choices[0].message.content


def test_text_completions(rig: RigServer) -> None:
    create = rig.client.completions.create
    answer = create(model="smollm2-135m", prompt="The sea is", max_tokens=4)
    assert answer.choices[0].text
    chunks = list(create(model="smollm2-135m", prompt="The sea is", max_tokens=4, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_models_and_aliases(rig: RigServer) -> None:
    assert {model.id for model in rig.client.models.list()} == {"smollm2-135m", "gpt-4o-mini"}
    assert rig.client.models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"
    answer = rig.client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=1)
    assert answer.model == "smollm2-135m"


def test_errors_are_the_sdks_exceptions(rig: RigServer) -> None:
    create: Any = rig.client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="smollm2-135m") as not_found:
        create(model="smollm2-135", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        rig.client.models.retrieve("nope")
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="smollm2-135m", messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(model="smollm2-135m", messages=HELLO, store=True)
    assert unsupported.value.param == "store"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="smollm2-135m", messages=[{"role": "user", "content": "sea " * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as long_stream:
        create(
            model="smollm2-135m", messages=[{"role": "user", "content": "sea " * 600}], stream=True
        )
    assert long_stream.value.code == "context_length_exceeded"


def test_request_ids_go_in_and_out(rig: RigServer) -> None:
    answer = rig.client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, max_tokens=1, extra_headers={"x-request-id": "abc"}
    )
    assert answer._request_id == "abc"
    assert rig.get("/health").headers["x-request-id"].startswith("req-")
    assert rig.get("/health", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"\xff\x00", 400),
        ("POST", "/v1/chat/completions", b"x" * 11_000_000, 413),
        ("POST", "/detokenize", b'{"model": "smollm2-135m", "tokens": [1%030d]}' % 0, 400),
    ],
)
def test_bad_requests_get_openais_error_shape(
    rig: RigServer, method: str, path: str, body: bytes, status: int
) -> None:
    answer = requests.request(method, rig.base_url + path, data=body, timeout=30)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_hangs_up_is_metered(rig: RigServer) -> None:
    before = rig.series("rigserve_requests_total")
    tokens = rig.total("rigserve_completion_tokens_total")
    stream = rig.client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, stream=True, extra_body={"ignore_eos": True}
    )
    for _, chunk in zip(range(4), stream, strict=False):
        assert chunk.choices
    stream.close()
    label = '{endpoint="/v1/chat/completions",model="smollm2-135m",status="499"}'

    def counted() -> bool:
        after = rig.series("rigserve_requests_total")
        return after.get(label, 0) == before.get(label, 0) + 1

    wait_for(counted, "the request is counted as 499")
    assert 3 <= rig.total("rigserve_completion_tokens_total") - tokens < 300
    wait_for(lambda: rig.total("rigserve_sequences_running") == 0, "its slot is free", 2)


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x00\x01\x02 what is this\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: x",
    ],
)
def test_half_a_request_does_no_harm(rig: RigServer, sent: bytes) -> None:
    host, _, port = rig.base_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent)
    assert rig.get("/health").status_code == 200
    assert rig.total("rigserve_requests_in_flight") == 0
    assert "Traceback" not in rig.output


def send_and_leave(rig: RigServer, body: bytes, length: int) -> None:
    """Send a request's head and ``body``, then hang up."""
    with socket.create_connection(("127.0.0.1", rig.config["server"]["port"])) as client:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: rig\r\nContent-Length: {length}\r\n\r\n"
        )
        client.sendall(head.encode() + body)


def test_a_client_that_hangs_up_before_its_body_is_complete(rig: RigServer) -> None:
    label = '{endpoint="/v1/chat/completions",model="unknown",status="499"}'
    before = rig.series("rigserve_requests_total").get(label, 0)
    send_and_leave(rig, b'{"model"', 1000)
    wait_for(
        lambda: rig.series("rigserve_requests_total").get(label, 0) == before + 1, "it is counted"
    )
    assert "Traceback" not in rig.output


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_at_once_leaves_nothing_behind(rig: RigServer, stream: bool) -> None:
    label = '{endpoint="/v1/chat/completions",model="smollm2-135m",status="499"}'
    before = rig.series("rigserve_requests_total").get(label, 0)
    request = {"model": "smollm2-135m", "messages": HELLO, "ignore_eos": True, "stream": stream}
    body = json.dumps(request).encode()
    for _ in range(4):
        send_and_leave(rig, body, len(body))
    wait_for(
        lambda: rig.series("rigserve_requests_total").get(label, 0) == before + 4, "all count", 3
    )
    assert rig.total("rigserve_requests_in_flight") == 0
    assert rig.total("rigserve_sequences_running") == 0
    assert "Traceback" not in rig.output


def test_a_refused_request_costs_nothing(rig: RigServer) -> None:
    joules = rig.total("rigserve_energy_joules_total")
    for stream in (True, False):
        with pytest.raises(openai.BadRequestError):
            rig.client.chat.completions.create(
                model="smollm2-135m",
                messages=[{"role": "user", "content": "sea " * 600}],
                stream=stream,
            )
    assert rig.total("rigserve_energy_joules_total") == joules


def test_a_service_tier_is_honoured_and_headers_of_clients_are_not(rig: RigServer) -> None:
    def tier(asked: Any, headers: dict[str, str]) -> str | None:
        answer = rig.client.chat.completions.create(
            model="smollm2-135m",
            messages=HELLO,
            max_tokens=1,
            service_tier=asked,
            extra_headers=headers,
        )
        return answer.service_tier

    assert tier("flex", {}) == "flex"
    assert tier("auto", {}) == "default"
    assert tier("auto", {"x-rigserve-priority": "batch"}) == "default"
    assert tier("flex", {"x-rigserve-priority": "interactive"}) == "flex"
    with pytest.raises(openai.BadRequestError, match="service_tier"):
        tier("priority", {})


def test_unknown_models_make_no_series(rig: RigServer) -> None:
    for number in range(3):
        with pytest.raises(openai.NotFoundError):
            rig.client.chat.completions.create(model=f"made-up-{number}", messages=HELLO)
    text = rig.get("/metrics").text
    assert "made-up" not in text
    assert 'model="unknown",status="404"' in text


def test_the_api_docs_describe_the_bodies(rig: RigServer) -> None:
    assert rig.get("/docs").status_code == 200
    paths = rig.get("/openapi.json").json()["paths"]
    schema = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert "messages" in schema["schema"]["properties"]
