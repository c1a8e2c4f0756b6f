"""Given a running gateway, what becomes of requests that are broken on the wire, or whose clients are."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.processes import RigServer, wait_for, write_config

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Tell me about the sea."}]
BODY = json.dumps({"model": "smollm2-135m", "messages": HELLO, "max_tokens": 2}).encode()
STREAM = json.dumps(
    {"model": "smollm2-135m", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
).encode()  # fmt: skip
HUNDRED_MB = 100 * 1024 * 1024


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server that waits a second for bodies."""
    path = write_config(tmp_path_factory.mktemp("rig"), cache_dir, max_sequences=2)
    config = yaml.safe_load(path.read_text())
    config["server"] |= {"body_timeout_seconds": 1}
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def connect(rig: RigServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", rig.config["server"]["port"]), 30)


def post(*headers: str, body: bytes = b"") -> bytes:
    """A request for a chat completion with these headers."""
    lines = [f"POST {CHAT} HTTP/1.1", "host: x", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def whole(body: bytes = BODY) -> bytes:
    return post(f"content-length: {len(body)}", body=body)


def answer_to(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of the next answer."""
    with client.makefile("rb") as received:
        status = int(received.readline().split()[1])
        size = 0
        while (line := received.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            size = int(value) if name.lower() == b"content-length" else size
        return status, json.loads(received.read(size))


def gone(client: socket.socket) -> None:
    """Reset the connection, as a client does that crashes."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def is_idle(rig: RigServer) -> bool:
    names = "rigserve_requests_in_flight", "rigserve_sequences_running", "rigserve_requests_queued"
    return not any(rig.total(name) for name in names)


@pytest.mark.parametrize("header", ["content-length: 104857600", "transfer-encoding: chunked"])
def test_100_mb_are_refused_before_they_are_sent(rig: RigServer, header: str) -> None:
    chunked = "chunked" in header
    piece = b" " * 65536
    sent = 0
    with connect(rig) as client:
        client.sendall(post(header))
        client.settimeout(0.05 if not chunked else 0)
        answer = b""
        while not answer and sent < HUNDRED_MB:
            try:
                answer = client.recv(65536)
            except (BlockingIOError, TimeoutError):
                client.settimeout(30)
                client.sendall(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
                sent += len(piece)
                client.settimeout(0)
            except ConnectionResetError:
                break
    assert answer.startswith(b"HTTP/1.1 413 ")
    # The limit is 10 MiB; some more is on its way by the time that the answer is.
    assert sent < HUNDRED_MB / 4


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost x\r\n\r\n",
        post("content-length: -1"),
        post("content-length: 1e3"),
        post("content-length: 5", "content-length: 6", body=b"{}    "),
        post(f"content-length: {10**30}"),
        post("content-length: 5", "transfer-encoding: chunked", body=b"0\r\n\r\n"),
        post("transfer-encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
        post("x-\0: y", "content-length: 2", body=b"{}"),
        post("x: a\0b", "content-length: 2", body=b"{}"),
    ],
)
def test_what_is_no_http_gets_400_as_json_and_is_cut_off(
    rig: RigServer, request_bytes: bytes
) -> None:
    with connect(rig) as client:
        # A second request hidden behind a wrong length must not be answered.
        client.sendall(request_bytes + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while data := client.recv(65536):
            received += data
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_pipelined_requests_are_answered_in_their_order(rig: RigServer) -> None:
    with connect(rig) as client:
        client.sendall(
            whole() + whole(b"[]") + whole() + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        with client.makefile("rb") as received:
            statuses: list[int] = []
            while len(statuses) < 4:
                line = received.readline()
                assert line, statuses
                if line.startswith(b"HTTP/1.1 ") or b"HTTP/1.1 " in line:
                    statuses.append(int(line.partition(b"HTTP/1.1 ")[2].split()[0]))
    assert statuses == [200, 400, 200, 200]


def test_a_body_in_single_bytes_is_a_body(rig: RigServer) -> None:
    with connect(rig) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
        for at in range(0, len(chunks), 7):
            client.sendall(
                (post("transfer-encoding: chunked") if not at else b"") + chunks[at : at + 7]
            )
        status, answer = answer_to(client)
    assert status == 200
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_clients_that_vanish_in_a_body_are_499(rig: RigServer) -> None:
    label = f'{{endpoint="{CHAT}",model="unknown",status="499"}}'
    for header in ("content-length: 1000", "transfer-encoding: chunked"):
        before = rig.series("rigserve_requests_total").get(label, 0)
        client = connect(rig)
        client.sendall(post(header, body=b"1\r\n{\r\n"))
        time.sleep(0.1)
        gone(client)
        wait_for(
            lambda before=before: rig.series("rigserve_requests_total").get(label, 0) == before + 1,  # type: ignore[misc]
            "the request is counted",
        )


def test_half_an_upload_is_408_and_one_that_is_broken_off_leaves_nothing(rig: RigServer) -> None:
    # Beyond what is kept in memory, it goes to the disk.
    part = (
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 2**21
    )
    head = "\r\n".join(
        [
            "POST /v1/files HTTP/1.1",
            "host: x",
            "content-type: multipart/form-data; boundary=b",
            f"content-length: {2**22}",
            "",
            "",
        ]
    ).encode()
    process = psutil.Process(rig.process.pid)
    rig.get("/health")
    before = process.num_fds()
    with connect(rig) as client:
        client.sendall(head + part)
        status, answer = answer_to(client)
    assert status == 408
    assert answer["error"]["code"] == "request_timeout"
    for _ in range(10):
        client = connect(rig)
        client.sendall(head + part)
        gone(client)
    wait_for(lambda: process.num_fds() <= before, "connections and temporary files are closed")
    assert rig.get("/v1/files").json()["data"] == []


def test_clients_that_reset_give_their_slots_back(rig: RigServer) -> None:
    clients = [connect(rig) for _ in range(6)]
    for client in clients:
        client.sendall(whole(STREAM))
    wait_for(lambda: rig.total("rigserve_sequences_running") == 2, "both slots are taken")
    for client in clients:
        gone(client)
    wait_for(lambda: is_idle(rig), "all is given back", 10)


def test_a_slowly_read_stream_ends_as_it_should(rig: RigServer) -> None:
    with connect(rig) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(whole(STREAM))
        received = b""
        while b"data: [DONE]" not in received:
            data = client.recv(2048)
            assert data, received[-500:]
            received += data
            time.sleep(0.005)
    assert b'"finish_reason":"length"' in received
    wait_for(lambda: is_idle(rig), "all is given back")


def test_nothing_failed_inside(rig: RigServer) -> None:
    """After all of the above."""
    assert "Traceback" not in rig.output
    wait_for(lambda: is_idle(rig), "all is given back")
    failed = [labels for labels in rig.series("rigserve_requests_total") if 'status="5' in labels]
    assert failed == []
