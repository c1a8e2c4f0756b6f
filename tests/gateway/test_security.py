"""Given a running gateway, no request makes it read a file or speak to a host that the request names."""

from __future__ import annotations

import base64
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.processes import RigServer, wait_for, write_config

SECRET = "kept-in-a-file-of-the-server"  # noqa: S105


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server with a secret in a file beside its config; the paths of the requests are below /."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir, max_sequences=2)
    path.with_name("secret.txt").write_text(SECRET)
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


class _Canary(http.server.BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def canary() -> Iterator[str]:
    """The URL of a server that nobody should ask."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Canary)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/picture.png"
    server.shutdown()
    server.server_close()


def bodies_with(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of the API where a client may put a URL."""
    base = {"model": "smollm2-135m"}
    picture = [{"type": "image_url", "image_url": {"url": url}}]
    yield "/v1/chat/completions", base | {"messages": [{"role": "user", "content": picture}]}
    yield (
        "/v1/responses",
        base
        | {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]},
    )
    yield (
        "/v1/responses",
        base | {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]},
    )
    source = {"type": "url", "url": url}
    yield (
        "/v1/messages",
        base
        | {
            "max_tokens": 2,
            "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
        },
    )
    yield "/v1/responses", base | {
        "input": "x", "tools": [{"type": "mcp", "server_label": "x", "server_url": url}]
    }  # fmt: skip


def test_no_url_of_a_request_is_fetched(rig: RigServer, canary: str) -> None:
    secret = rig.config_path.with_name("secret.txt").as_uri()
    for url in (canary, secret, secret.removeprefix("file://")):
        for path, body in bodies_with(url):
            answer = requests.post(rig.base_url + path, json=body, timeout=30)
            assert answer.status_code == 400, (path, url, answer.text)
            assert SECRET not in answer.text
            assert base64.b64encode(SECRET.encode()).decode() not in answer.text
    assert _Canary.asked == []
    requests.get(canary, timeout=10)
    wait_for(lambda: _Canary.asked == ["/picture.png"], "the canary can be asked at all")


def test_no_path_of_a_request_is_a_file(rig: RigServer) -> None:
    file = rig.config_path.with_name("secret.txt")
    up = "../" * 20
    names = [
        str(file),
        up + str(file)[1:],
        (up + str(file)[1:]).replace("/", "%2f"),
        f"..%2f{file.name}",
    ]
    places = (
        "/", "/docs/", "/v1/models/", "/v1/files/", "/v1/batches/", "/v1/responses/", "/admin/models/",
    )  # fmt: skip
    for place in places:
        for name in names:
            # requests would tidy the path up.
            request = requests.Request("GET", rig.base_url).prepare()
            request.url = rig.base_url + place + name
            answer = requests.Session().send(request, timeout=30)
            assert answer.status_code in (400, 404, 405), (place, name, answer.status_code)
            assert SECRET not in answer.text
    chat: dict[str, Any] = {"model": str(file), "messages": [{"role": "user", "content": "x"}]}
    assert (
        requests.post(rig.base_url + "/v1/chat/completions", json=chat, timeout=30).status_code
        == 404
    )


def test_the_name_of_an_upload_is_no_path(rig: RigServer) -> None:
    folder = rig.config_path.parent
    upload = {"file": (f"{'../' * 3}escaped.txt", b"{}")}
    answer = requests.post(
        rig.base_url + "/v1/files", files=upload, data={"purpose": "user_data"}, timeout=30
    )
    assert answer.status_code in (200, 400)
    assert not list(folder.parent.rglob("escaped.txt"))
