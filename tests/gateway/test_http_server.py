"""Given a running gateway, what it puts up with from its clients' connections, and what it tells browsers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from serving.config import ServerConfig
from serving.gateway.http_server import HttpServer, _network_of
from tests.processes import RigServer, wait_for, write_config

HOST = "127.0.0.1"
HEAD = b"GET /health HTTP/1.1\r\nhost: x\r\n"
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """A server with little patience, which needs no engine."""
    path = impatient(tmp_path_factory.mktemp("rig"), cache_dir)
    with RigServer(path) as server:
        wait_for(lambda: server.answers("/health"), "it listens")
        yield server


def impatient(folder: Path, cache_dir: Path, **settings: Any) -> Path:
    path = write_config(folder, cache_dir, load="on_demand", max_sequences=2)
    config = yaml.safe_load(path.read_text())
    config["server"] |= {
        "header_timeout_seconds": 2.0,
        "idle_timeout_seconds": 2.0,
        "write_timeout_seconds": 2.0,
        "max_header_bytes": 4096,
        "max_headers": 20,
        "max_connections": 30,
        "cors_origins": [ORIGIN],
        **settings,
    }
    path.write_text(yaml.safe_dump(config))
    return path


def connect(rig: RigServer) -> socket.socket:
    return socket.create_connection((HOST, rig.config["server"]["port"]), 10)


def all_of(client: socket.socket) -> bytes:
    """What is sent until the connection is closed."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def test_a_head_that_trickles_in_gets_408(rig: RigServer) -> None:
    with connect(rig) as client:
        started = time.monotonic()
        client.sendall(HEAD)
        client.settimeout(0.1)
        answer = b""
        for _ in range(100):
            try:
                client.sendall(b"a")
                answer += client.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if answer:
                break
        assert time.monotonic() - started < 8
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"server.header_timeout_seconds" in answer


@pytest.mark.parametrize("first", [b"", b"\r\n", HEAD + b"\r\n", HEAD + b"\r\n\r\n"])
def test_a_connection_that_asks_for_nothing_more_is_closed(rig: RigServer, first: bytes) -> None:
    with connect(rig) as client:
        client.sendall(first)
        started = time.monotonic()
        all_of(client)
        assert 1 < time.monotonic() - started < 8


def test_a_body_that_nobody_waits_for_is_not_waited_for(rig: RigServer) -> None:
    with connect(rig) as client:
        client.sendall(HEAD + b"content-length: 100000\r\n\r\n")
        trickle = iter(range(50))
        with contextlib.suppress(ConnectionError):
            for _ in trickle:
                time.sleep(0.1)
                client.sendall(b"x")
        assert next(trickle, None) is not None, "it took all of it"


def test_pauses_between_requests_are_no_offence(rig: RigServer) -> None:
    with connect(rig) as client:
        for _ in range(4):
            client.sendall(HEAD[:20])
            time.sleep(0.3)
            client.sendall(HEAD[20:] + b"\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += client.recv(65536)
            time.sleep(0.3)


def test_a_client_that_takes_nothing_is_cut_off(rig: RigServer) -> None:
    asked = 500
    with connect(rig) as client:
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * asked)
        time.sleep(6)
        # What the system had taken on the way is still there.
        assert 0 < all_of(client).count(b"HTTP/1.1 200 OK") < asked


def test_a_client_that_reads_slowly_is_not(rig: RigServer) -> None:
    wanted = 300
    with connect(rig) as client:
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * wanted)
        received, started = bytearray(), time.monotonic()
        while received.count(b"HTTP/1.1 200 OK") < wanted:
            data = client.recv(2**20)
            assert data, received.count(b"HTTP/1.1 200 OK")
            received += data
            if time.monotonic() - started < 4:
                time.sleep(0.1)


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"x: " + b"y" * 5000 + b"\r\n\r\n",
        HEAD + b"x: " + b"y" * 600_000,
        b"GET /" + b"y" * 5000 + b" HTTP/1.1\r\n\r\n",
        HEAD + b"".join(b"x-%d: y\r\n" % number for number in range(21)) + b"\r\n",
    ],
    ids=["long", "endless", "long path", "many"],
)
def test_431_for_large_heads(rig: RigServer, head: bytes) -> None:
    with connect(rig) as client:
        try:
            client.sendall(head)
        except ConnectionError:
            assert "y" * 1000 in head.decode()  # it was hung up on before it was through
            return
        answer = all_of(client)
    # A close before all was read may overtake the answer.
    assert answer.startswith(b"HTTP/1.1 431 ") or (not answer and len(head) > 100_000)


def test_what_is_no_http_gets_an_error_of_ours(rig: RigServer) -> None:
    with connect(rig) as client:
        client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        answer = all_of(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"invalid_http"' in answer


def test_503_beyond_the_most_connections(rig: RigServer) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(rig)) for _ in range(40)]
        answers = [all_of(client) for client in clients]
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503 ")]
    assert 10 <= len(refused) <= 11
    assert all(b"\r\nretry-after: 1\r\n" in answer for answer in refused)
    assert rig.get("/health").status_code == 200  # they count no more


def test_429_beyond_the_most_connections_of_an_address(tmp_path: Path, cache_dir: Path) -> None:
    address = own_address()
    path = impatient(
        tmp_path,
        cache_dir,
        host="0.0.0.0",  # noqa: S104
        allow_remote=True,
        max_connections_per_address=5,
    )
    with RigServer(path) as rig:
        wait_for(lambda: rig.answers("/health"), "it listens")
        there = (address, rig.config["server"]["port"])
        with ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(there, 10)) for _ in range(12)]
            # This machine's own are not counted, and are let in all the while.
            assert rig.get("/health").status_code == 200
            answers = [all_of(client) for client in clients]
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 429 ")]
        assert len(refused) == 7
        assert b"server.max_connections_per_address" in refused[0]
        again = requests.get(f"http://{address}:{there[1]}/health", timeout=10)
        assert again.status_code == 200  # they count no more


def own_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses a way
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        return str(probe.getsockname()[0])


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("127.0.0.1", ""), ("::1", ""), ("::ffff:127.0.0.1", ""),
        ("192.0.2.7", "192.0.2.7"), ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64"),
    ],
)  # fmt: skip
def test_whose_an_address_is(address: str, network: str) -> None:
    assert _network_of(address) == network


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        ("127.0.0.1", "203.0.113.9"),
        ("::1", "203.0.113.9"),
        ("::ffff:127.0.0.1", "203.0.113.9"),
        ("198.51.100.1", "198.51.100.1"),
    ],
)
def test_only_proxies_of_this_machine_are_believed_whom_they_speak_for(
    peer: str, told: str
) -> None:
    seen: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["client"][0])

    async def main() -> None:
        server = HttpServer(app, ServerConfig(), lambda _: None)
        scope: Any = {
            "type": "http",
            "client": (peer, 1),
            "headers": [(b"x-forwarded-for", b"203.0.113.9")],
        }
        nobody: Any = None
        await server.config.loaded_app(scope, nobody, nobody)

    asyncio.run(main())
    assert seen == [told]


def test_security_headers_on_all_that_is_answered(rig: RigServer) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/docs"):
        headers = rig.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
        assert headers.get("cache-control") == ("no-store" if path == "/v1/models" else None)


def test_only_listed_sites_may_use_it_from_a_browser(rig: RigServer) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    url = rig.base_url + "/v1/chat/completions"
    allowed = requests.options(url, headers={"origin": ORIGIN, **asks}, timeout=10)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    for origin in ("https://evil.example", ORIGIN + ".evil.example", "null"):
        refused = requests.options(url, headers={"origin": origin, **asks}, timeout=10)
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
    answer = rig.get("/v1/models", headers={"origin": ORIGIN})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    exposed = answer.headers["access-control-expose-headers"]
    assert {"x-request-id", "x-ratelimit-remaining-tokens"} <= set(exposed.split(", "))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/v1/batches"])
def test_what_browsers_send_unasked_for_other_sites_is_refused(rig: RigServer, path: str) -> None:
    """Of a page's `fetch` with `no-cors` and bytes for a body, or of its form, nobody is asked before."""
    for headers, may in (
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, False),
        ({"sec-fetch-site": "same-site", "origin": "null"}, False),
        ({"sec-fetch-site": "cross-site", "origin": ORIGIN}, True),
        ({"sec-fetch-site": "same-origin", "origin": rig.base_url}, True),
        ({}, True),
    ):
        answer = requests.post(rig.base_url + path, data=b"{}", headers=headers, timeout=10)
        is_refused = answer.status_code == 403 and answer.json()["error"]["code"] == "cross_site"
        assert is_refused == (not may), (headers, answer.text)


def write_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *(
                "-nodes",
                "-days",
                "7",
                "-subj",
                f"/CN={name}",
                "-addext",
                f"subjectAltName=IP:{HOST}",
            ),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def name_of_certificate(port: int) -> str:
    """The common name in the certificate that a server shows."""
    shown = ssl.get_server_certificate((HOST, port))
    command = ["openssl", "x509", "-noout", "-subject"]
    told = subprocess.run(command, input=shown, capture_output=True, text=True, check=True).stdout
    return told.strip().rpartition("=")[2].strip()


def test_https_with_a_certificate_that_is_renewed(tmp_path: Path, cache_dir: Path) -> None:
    certificate, key = write_certificate(tmp_path, "first")
    path = impatient(tmp_path, cache_dir, tls_certificate=str(certificate), tls_key=str(key))
    with RigServer(path) as rig:
        port = rig.config["server"]["port"]
        url = f"https://{HOST}:{port}"
        rig.wait_for_output(f"listening on {url}/v1", 60)
        assert requests.get(url + "/health", verify=str(certificate), timeout=10).status_code == 200
        metrics = requests.get(url + "/metrics", verify=str(certificate), timeout=10).text
        line = next(each for each in metrics.splitlines() if each.startswith("rigserve_tls_"))
        assert 6 < (float(line.split()[-1]) - time.time()) / 86400 < 7.1
        second, second_key = write_certificate(tmp_path, "second")
        certificate.write_bytes(second.read_bytes())
        rig.wait_for_output("is not the key of")
        assert name_of_certificate(port) == "first"
        key.write_bytes(second_key.read_bytes())
        wait_for(lambda: name_of_certificate(port) == "second", "the renewed certificate is used")
        assert rig.stop(signal.SIGTERM) == 0


def test_files_that_make_no_certificate_are_refused_by_name(
    tmp_path: Path, cache_dir: Path
) -> None:
    certificate, _ = write_certificate(tmp_path, "one")
    other, other_key = write_certificate(tmp_path, "other")
    other.write_text("no certificate")
    for files, words in (
        ((certificate, other_key), f"{other_key} is not the key of {certificate}"),
        ((other, other_key), f"{other} and {other_key} are not a certificate"),
        ((certificate, tmp_path / "gone"), f"there is no file {tmp_path / 'gone'}"),
    ):
        path = impatient(tmp_path, cache_dir, tls_certificate=str(files[0]), tls_key=str(files[1]))
        with RigServer(path) as rig:
            assert rig.process.wait(60) == 2
        assert words in rig.output
