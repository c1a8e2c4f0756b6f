"""Given a running gateway, what a client sees that errs, and what of its request the config changes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import openai
import pytest
import requests
import yaml
from starlette.testclient import TestClient

from serving.gateway.access import Access
from serving.gateway.app import create_app
from serving.gateway.intake import Gateway
from serving.gateway.limits import Limits
from serving.keys.ring import KeyRing
from serving.metrics import Metrics
from tests.processes import RigServer, wait_for, write_config

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
CHAT = "/v1/chat/completions"
BODY = {"model": "smollm2-135m", "messages": HELLO, "max_tokens": 2}
SYSTEM_PROMPT = "You are the captain of a ship. Answer in one sentence."


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server that waits a second for bodies, with a second, lenient and filtered model."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir, max_sequences=2)
    config = yaml.safe_load(path.read_text())
    config["server"] |= {"body_timeout_seconds": 1, "max_body_bytes": 200_000}
    filters = {
        "defaults": {"temperature": 0},
        "forced": {"seed": 7},
        "stripped": ["metadata"],
        "system_prompt": SYSTEM_PROMPT,
        "max_tokens_default": 3,
        "max_tokens_ceiling": 5,
    }
    filtered = {"name": "filtered", "aliases": ["f"], "lenient": True, "filters": filters}
    config["models"].append(config["models"][0] | filtered)
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def post(rig: RigServer, path: str = CHAT, **options: Any) -> requests.Response:
    return requests.post(rig.base_url + path, timeout=30, **options)


def error_of(answer: requests.Response) -> dict[str, Any]:
    """The error in an answer, which has the shape of OpenAI's."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = "invalid_request_error" if answer.status_code < 500 else "api_error"
    assert error["type"] == kind
    assert answer.headers["x-request-id"].startswith("req-")
    assert answer.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("PUT", "/v1/models/some/model", "GET"),
        ("OPTIONS", "/tokenize", "POST"),
    ],
)
def test_405_tells_what_is_allowed(rig: RigServer, method: str, path: str, allow: str) -> None:
    answer = requests.request(method, rig.base_url + path, timeout=30)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allow
    assert error_of(answer)["message"].startswith(f"{method} {path} is not allowed")


def test_404_names_the_path_or_the_model(rig: RigServer) -> None:
    answer = post(rig, "/v1/chat/completion", json=BODY)
    assert answer.status_code == 404
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("unknown_url", None)
    assert "POST /v1/chat/completion;" in error["message"]
    answer = post(rig, json=BODY | {"model": "filtred"})
    assert answer.status_code == 404
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "filtered" in error["message"]


@pytest.mark.parametrize(
    "head", ["content-length: 100\r\n\r\n{", "transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"]
)
def test_408_for_half_a_body(rig: RigServer, head: str) -> None:
    label = f'{{endpoint="{CHAT}",model="unknown",status="408"}}'
    before = rig.series("rigserve_requests_total").get(label, 0)
    with socket.create_connection(("127.0.0.1", rig.config["server"]["port"]), 10) as client:
        client.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{head}".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b""))  # to the end: it hangs up
    status, _, rest = answer.partition(b"\r\n")
    assert status.startswith(b"HTTP/1.1 408")
    assert b"x-request-id: req-" in rest
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "request_timeout"
    assert "server.body_timeout_seconds" in error["message"]
    assert rig.series("rigserve_requests_total")[label] == before + 1


def test_413_declared_or_not(rig: RigServer) -> None:
    body = b'{"model": "' + b"x" * 300_000
    chunks = (body[at : at + 10_000] for at in range(0, len(body), 10_000))
    for data in (body, chunks):
        answer = post(rig, data=data)
        assert answer.status_code == 413
        assert "200000" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"content-type": "text/plain"}, "text/plain"),
        ({"content-type": "application/x-www-form-urlencoded"}, "urlencoded"),
        ({"content-type": "multipart/form-data; boundary=x"}, "multipart/form-data"),
        ({"content-type": "application/json; charset=latin-1"}, "latin-1"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "gzip"),
    ],
)
def test_415_for_what_is_not_plain_json(
    rig: RigServer, headers: dict[str, str], words: str
) -> None:
    answer = post(rig, data=json.dumps(BODY), headers=headers)
    assert answer.status_code == 415
    error = error_of(answer)
    assert error["code"] == "unsupported_media_type"
    assert words in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "application/json"},
        {"content-type": 'Application/JSON; charset="UTF-8"'},
        {"content-encoding": "identity"},
    ],
)
def test_json_is_taken_however_it_is_announced(rig: RigServer, headers: dict[str, str]) -> None:
    assert post(rig, data=json.dumps(BODY).encode(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model": "smollm2-135m", "model": "smollm2-135m"}',
        b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": NaN}',
        b'{"model": []}',
        b'{"model": "\\u0000"}',
        b'{"n": 1e400}',
        b"[" * 100_000,
        b'{"messages":' * 10_000,
        json.dumps(BODY | {"n": -1}).encode(),
        json.dumps(BODY | {"n": 10**30}).encode(),
        json.dumps(BODY | {"max_tokens": -5}).encode(),
        json.dumps(BODY | {"user": "\0" * 300}).encode(),
        json.dumps(BODY | {"\0\r\n": 1}).encode(),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/tokenize"])
def test_400_for_what_makes_no_sense(rig: RigServer, path: str, body: bytes) -> None:
    answer = post(rig, path, data=body)
    assert answer.status_code in (400, 404)
    error_of(answer)


def test_odd_characters_do_no_harm(rig: RigServer) -> None:
    messages = [{"role": "user", "content": "a\0b\r\n\u2028\U0010ffff"}]
    answer = post(rig, json=BODY | {"messages": messages, "user": "a\0b\r\nx: y\u2028"})
    assert answer.status_code == 200
    assert "x" not in answer.headers


def test_a_long_address_or_header_is_no_crash(rig: RigServer) -> None:
    for path, headers in (
        ("/v1/" + "x" * 60_000, {}),
        ("/v1/models", {"x-long": "x" * 60_000}),
        ("/v1/models/%ff%00%0d%0a", {}),
    ):
        answer = rig.get(path, headers=headers)
        assert answer.status_code < 500
        assert len(answer.content) < 2000
    assert rig.get("/health").status_code == 200


def test_nothing_failed_inside(rig: RigServer) -> None:
    """After all of the above."""
    assert "Traceback" not in rig.output
    wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "all requests have ended")
    failed = [labels for labels in rig.series("rigserve_requests_total") if 'status="5' in labels]
    assert failed == []


def test_a_bug_is_a_500_with_the_requests_id(tmp_path: Path) -> None:
    gateway = cast(Gateway, Mock(spec=Gateway))
    with closing(KeyRing(tmp_path)) as ring:
        gateway.access = Access(
            ring, Limits(), Metrics(), require_keys=False, metrics_access="loopback"
        )
        _check_bugs(gateway)


def _check_bugs(gateway: Gateway) -> None:
    app = create_app(gateway)

    @app.get("/bug")
    async def bug() -> None:
        raise AssertionError

    @app.get("/number")
    async def number(limit: int) -> int:
        return limit

    client = TestClient(app, raise_server_exceptions=False)
    answer = client.get("/bug", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert "mine" in answer.json()["error"]["message"]
    answer = client.get("/number", params={"limit": "many"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "limit"


def test_filters_apply_and_are_told(rig: RigServer) -> None:
    plain = post(rig, json=BODY)
    assert "x-rigserve-ignored" not in plain.headers
    request: Any = {"model": "f", "messages": HELLO, "max_tokens": 400, "metadata": {"a": "b"}}
    answer = post(rig, json=request | {"seed": 3, "ignore_eos": True})
    assert answer.status_code == 200
    assert answer.headers["x-rigserve-ignored"] == "metadata, max_tokens, seed"
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 5
    told = [{"role": "system", "content": SYSTEM_PROMPT}, *HELLO]
    prompted = post(rig, json=BODY | {"messages": told}).json()["usage"]["prompt_tokens"]
    assert usage["prompt_tokens"] == prompted != plain.json()["usage"]["prompt_tokens"]
    silent = post(rig, json={"model": "f", "messages": HELLO, "ignore_eos": True})
    assert silent.json()["usage"]["completion_tokens"] == 3
    assert "x-rigserve-ignored" not in silent.headers
    tokens = post(rig, "/tokenize", json={"model": "f", "messages": HELLO}).json()["count"]
    assert tokens == usage["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "ignored"),
    [
        ("/v1/completions", {"prompt": "The sea", "max_tokens": 400}, "max_tokens"),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 400}, "max_tokens"),
        ("/v1/responses", {"input": "Tell me.", "max_output_tokens": 400, "store": False}, "max_"),
    ],
)
def test_filters_apply_whichever_api_a_request_comes_by(
    rig: RigServer, path: str, body: dict[str, Any], ignored: str
) -> None:
    answer = post(rig, path, json={"model": "f", **body})
    assert answer.status_code == 200
    assert ignored in answer.headers["x-rigserve-ignored"]
    usage = answer.json()["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) <= 5


def test_a_lenient_model_tells_what_it_dropped(rig: RigServer) -> None:
    unknown: Any = {"store": True, "mood": "good", "messages": [HELLO[0] | {"mood": "bad"}]}
    strict = post(rig, json=BODY | unknown)
    assert strict.status_code == 400
    create: Any = rig.client.chat.completions.with_raw_response.create
    for stream in (False, True):
        answer = create(
            model="filtered",
            messages=unknown["messages"],
            store=True,
            stream=stream,
            extra_body={"mood": "good"},
        )
        assert set(answer.headers["x-rigserve-ignored"].split(", ")) == {
            *("store", "mood", "messages[].mood")
        }
        answer.parse()


def test_sdks_raise_their_own_exceptions(rig: RigServer) -> None:
    create: Any = rig.client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        create(model="smollm2-135m", messages=HELLO, verbosity="high")
    assert refused.value.param == "verbosity"
    assert "no such setting" in refused.value.message
    with pytest.raises(openai.APIStatusError) as large:
        create(model="smollm2-135m", messages=[{"role": "user", "content": "x" * 300_000}])
    assert large.value.status_code == 413


def test_a_mistake_in_the_filters_ends_the_start(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, filters={"forced": {"temprature": 1}})
    with RigServer(path) as server:
        assert server.process.wait(30) == 2
    assert "models[0].filters.forced.temprature: Unknown parameter" in server.output
    assert "Traceback" not in server.output
