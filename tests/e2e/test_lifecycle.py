"""Starting, crashing, draining, dying: what happens to streams, engines and orphans."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests

from tests.processes import RigServer, wait_for, write_config

HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
ENDLESS: Any = {"ignore_eos": True}


@pytest.fixture
def own_rig(tmp_path: Path, cache_dir: Path) -> Any:
    """A server that the test may break."""
    with RigServer(write_config(tmp_path, cache_dir, max_sequences=4)) as server:
        server.wait_until_ready()
        yield server


def ledger_rows(rig: RigServer) -> list[tuple[Any, ...]]:
    with sqlite3.connect(rig.ledger_path) as connection:
        return connection.execute(
            "SELECT status, completion_tokens, tokens_source FROM usage"
        ).fetchall()


def test_an_engine_killed_mid_stream(rig: RigServer) -> None:
    stream = rig.client.chat.completions.create(
        model="smollm2-135m", messages=HELLO, stream=True, extra_body=ENDLESS
    )
    next(iter(stream))
    restarts = rig.total("rigserve_engine_restarts")
    [engine] = rig.engines()
    guard = engine.parent()
    # As long as its guard sleeps, nobody knows of its death.
    guard.suspend()
    engine.send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match="stopped while it worked"):
        for _ in stream:
            pass
    wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "the stream is metered")
    url = f"{rig.base_url}/v1/chat/completions"
    body = {"model": "smollm2-135m", "messages": HELLO, "max_tokens": 1}
    with ThreadPoolExecutor(1) as client:
        # It finds nobody there, and waits until the engine is back.
        away = client.submit(requests.post, url, json=body, timeout=120)
        wait_for(lambda: rig.total("rigserve_requests_in_flight") == 1 or away.done(), "sent")
        guard.resume()
        assert away.result().status_code == 200
    wait_for(lambda: rig.total("rigserve_engine_restarts") == restarts + 1, "the death is noticed")
    rig.wait_until_ready()
    answer = rig.client.chat.completions.create(model="smollm2-135m", messages=HELLO, max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    assert "SIGKILL" in rig.output
    wait_for(lambda: (500, "estimated") in {(r[0], r[2]) for r in ledger_rows(rig)}, "the row")


def test_a_killed_guard_takes_its_engine_along_and_both_come_back(rig: RigServer) -> None:
    restarts = rig.total("rigserve_engine_restarts")
    [engine] = rig.engines()
    engine.parent().kill()
    psutil.wait_procs([engine], timeout=5)
    assert not engine.is_running()
    wait_for(lambda: rig.total("rigserve_engine_restarts") == restarts + 1, "the crash is noticed")
    rig.wait_until_ready()


def test_a_stopped_engine_does_not_hold_on_to_clients_that_leave(rig: RigServer) -> None:
    [engine] = rig.engines()
    engine.suspend()
    try:
        for stream in (True, False):
            with pytest.raises(requests.ReadTimeout):
                requests.post(
                    f"{rig.base_url}/v1/chat/completions",
                    json={"model": "smollm2-135m", "messages": HELLO, "stream": stream},
                    timeout=0.5,
                )
        wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "both are metered")
    finally:
        engine.resume()
    running = "rigserve_sequences_running"
    wait_for(lambda: list(rig.series(running).values()) == [0], "the engine is idle", 5)


def test_sigterm_lets_streams_finish_and_turns_new_requests_away(own_rig: RigServer) -> None:
    finished: list[Any] = []

    def consume() -> None:
        finished.extend(
            own_rig.client.chat.completions.create(
                model="smollm2-135m",
                messages=HELLO,
                max_tokens=200,
                stream=True,
                extra_body=ENDLESS,
            )
        )

    reader = threading.Thread(target=consume)
    reader.start()
    wait_for(lambda: own_rig.total("rigserve_sequences_running") == 1, "the stream runs")
    own_rig.process.send_signal(signal.SIGTERM)
    own_rig.wait_for_output("draining")
    with pytest.raises(openai.InternalServerError) as refused:
        own_rig.client.chat.completions.create(model="smollm2-135m", messages=HELLO)
    assert refused.value.code == "draining"
    assert own_rig.get("/ready").status_code == 503
    reader.join(60)
    assert finished[-1].choices[0].finish_reason == "length"
    assert own_rig.process.wait(20) == 0
    assert ledger_rows(own_rig) == [(200, 200, "engine")]


def test_a_drain_has_an_end(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=1, context_length=8192)
    path.write_text(
        path.read_text().replace("drain_timeout_seconds: 60", "drain_timeout_seconds: 1")
    )
    with RigServer(path) as rig:
        rig.wait_until_ready()
        stream = rig.client.chat.completions.create(
            model="smollm2-135m", messages=HELLO, stream=True, extra_body=ENDLESS
        )
        next(iter(stream))
        rig.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError):
            for _ in stream:
                pass
        assert rig.process.wait(20) == 0
        [(status, tokens, _)] = ledger_rows(rig)
        assert status == 500
        assert tokens > 1


def test_a_killed_server_leaves_no_orphan(own_rig: RigServer) -> None:
    children = psutil.Process(own_rig.process.pid).children(recursive=True)
    assert len(children) >= 2
    own_rig.stop(signal.SIGKILL)
    gone, alive = psutil.wait_procs(children, timeout=15)
    assert not alive
    assert len(gone) == len(children)


def test_two_servers_share_a_cache_and_a_ledger(tmp_path: Path, cache_dir: Path) -> None:
    first = write_config(tmp_path, cache_dir, max_sequences=1)
    second = tmp_path / "second.yaml"
    with RigServer(first) as one:
        port = one.config["server"]["port"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            second.write_text(
                first.read_text().replace(f"port: {port}", f"port: {probe.getsockname()[1]}")
            )
        with RigServer(second) as two:
            for rig in (one, two):
                rig.wait_until_ready()
                rig.client.chat.completions.create(
                    model="smollm2-135m", messages=HELLO, max_tokens=3
                )
            assert two.stop() == 0
        assert one.stop() == 0
    assert ledger_rows(one) == [(200, 3, "engine")] * 2


def run_serve(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving", "serve", str(path)],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ.copy(),
    )  # fmt: skip


def test_a_port_in_use_is_a_clear_error(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir)
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        config = path.read_text()
        path.write_text(config.replace(config.partition("port: ")[2].split("\n")[0], str(port), 1))
        result = run_serve(path)
    assert result.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
    assert "server.port" in result.stderr


@pytest.mark.parametrize("answers", [True, False])
def test_an_engine_port_in_use_is_a_clear_error(
    tmp_path: Path, cache_dir: Path, rig: RigServer, answers: bool
) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        # An engine of another rigserve, or somebody who never says a word.
        [other] = rig.engines()
        port = other.net_connections()[0].laddr.port if answers else squatter.getsockname()[1]
        result = run_serve(write_config(tmp_path, cache_dir, port=port, max_sequences=1))
    assert result.returncode == 2
    assert "address already in use" in result.stderr
    assert "smollm2-135m: ready" not in result.stderr


def test_a_model_that_cannot_be_loaded_is_a_clear_error(tmp_path: Path, cache_dir: Path) -> None:
    broken = tmp_path / "broken.gguf"
    # A sound header, but of nothing.
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    path = write_config(tmp_path, cache_dir, source=str(broken))
    path.write_text(path.read_text().replace("  quantization: Q8_0\n", ""))
    result = run_serve(path)
    assert result.returncode == 2
    assert "smollm2-135m" in result.stderr
    assert "Traceback" not in result.stderr
    assert "has no general.architecture" in result.stderr


def test_requests_while_loading_are_told_to_come_back(tmp_path: Path, cache_dir: Path) -> None:
    with RigServer(write_config(tmp_path, cache_dir)) as rig:
        wait_for(lambda: rig.answers("/health"), "the gateway answers")
        answer = requests.post(
            f"{rig.base_url}/v1/chat/completions",
            json={"model": "smollm2-135m", "messages": HELLO, "max_tokens": 1},
            timeout=30,
        )
        assert answer.status_code in (200, 503)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "model_not_ready"
            assert int(answer.headers["retry-after"]) > 0
        rig.wait_until_ready()


def test_sigterm_while_a_model_is_prepared_does_not_wait_for_it(tmp_path: Path) -> None:
    # An empty cache: the first thing the server does is to requantize.
    with RigServer(write_config(tmp_path, tmp_path / "cache")) as rig:
        rig.wait_for_output("preparing")
        assert rig.stop(signal.SIGTERM, seconds=10) == 0
        assert "Traceback" not in rig.output
