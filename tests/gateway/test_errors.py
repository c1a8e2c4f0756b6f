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
JSON_PATHS = (
    *(CHAT, "/v1/completions", "/v1/embeddings", "/v1/rerank", "/tokenize", "/detokenize"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/batches"),
)
SYSTEM_PROMPT = "You are the captain of a ship. Answer in one sentence."


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server that waits a second for bodies, with a second, lenient and filtered model."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir, max_sequences=2, max_queue=8)
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
    assert "POST /v1/chat/completion; did you mean /v1/chat/completions?" in error["message"]
    for path in ("/chat/completions", "/v1/v1/chat/completions", "/v1//v1/chat/completions"):
        error = error_of(post(rig, path, json=BODY))
        assert error["message"].endswith("; did you mean /v1/chat/completions?")
    assert error_of(post(rig, "/v1/moderations"))["message"].endswith("/docs lists what there is.")
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
        b"\0" * 1000,
        b'{"model": "smollm2-135m", "model": "smollm2-135m"}',
        b'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": NaN}',
        b'{"temperature": -Infinity}',
        b'{"n": 1e400}',
        b"[" * 50_000,
        b'{"messages":' * 10_000,
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("path", JSON_PATHS)
def test_400_for_what_is_no_json_object(rig: RigServer, path: str, body: bytes) -> None:
    answer = post(rig, path, data=body)
    assert answer.status_code == 400
    if path.startswith("/v1/messages"):
        assert answer.json()["error"]["type"] == "invalid_request_error"
    else:
        assert error_of(answer)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n", -1, "invalid_value"),
        ("n", 0, "invalid_value"),
        ("n", 129, "invalid_value"),
        ("n", 10**30, "invalid_value"),
        ("n", 1.5, "invalid_value"),
        ("n", "1", "invalid_value"),
        ("n", True, "invalid_value"),
        ("max_tokens", -5, "invalid_value"),
        ("max_tokens", 2**31, "invalid_value"),
        ("temperature", -0.1, "invalid_value"),
        ("temperature", 1e308, "invalid_value"),
        ("top_p", 0, "invalid_value"),
        ("seed", -(2**63) - 1, "invalid_value"),
        ("presence_penalty", -2.1, "invalid_value"),
        ("model", [], "invalid_value"),
        ("user", "\0" * 300, "invalid_value"),
        ("\0\r\n", 1, "unknown_parameter"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
        ("response_format", "json", "invalid_value"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_400_names_the_field_that_makes_no_sense(
    rig: RigServer, path: str, field: str, value: Any, code: str
) -> None:
    if path != CHAT and field == "response_format":
        code = "unknown_parameter"
    body = BODY if path == CHAT else {"model": BODY["model"], "prompt": "The sea"}
    answer = post(rig, path, json=body | {field: value})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"]) == (field, code)


def test_a_model_that_cannot_exist_is_not_found(rig: RigServer) -> None:
    answer = post(rig, json=BODY | {"model": "\0\r\nx"})
    assert answer.status_code == 404
    assert error_of(answer)["param"] == "model"


def test_more_choices_than_there_can_be_are_refused(rig: RigServer) -> None:
    answer = post(rig, json=BODY | {"n": 128})
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["param"], error["code"]) == ("n", "too_many_choices")


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

    @app.get("/v1/messages/bug")
    async def bug_of_messages() -> None:
        raise AssertionError

    @app.get("/number")
    async def number(limit: int) -> int:
        return limit

    client = TestClient(app, raise_server_exceptions=False)
    answer = client.get("/bug", headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert "mine" in answer.json()["error"]["message"]
    # The route above comes after the one that answers for all that is not there.
    app.router.routes.insert(0, app.router.routes.pop(-2))
    answer = client.get("/v1/messages/bug")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "api_error"
    assert answer.json()["request_id"] == answer.headers["request-id"]
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
