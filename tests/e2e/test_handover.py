"""Restarts with a socket that outlives the server: no connection is refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.test_lifecycle import ledger_rows
from tests.processes import RigServer, wait_for, write_config

# As systemd does it: the socket is descriptor 3, and the variables name the process that is meant.
_ACTIVATE = 'exec 3<&"$1"; shift; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'


class ActivatedServer(RigServer):
    """``rigserve serve`` on a socket that somebody else opened."""

    def __init__(self, config_path: Path, listener: socket.socket) -> None:
        super().__init__(config_path)
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        os.set_inheritable(listener.fileno(), True)
        self._command = ["bash", "-c", _ACTIVATE, "bash", str(listener.fileno()), *self._command]
        self._inherited = (listener.fileno(),)

    def wait_until_listening(self) -> None:
        self.wait_for_output("listening on", 60)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        opened.listen(512)
        yield opened


def complete(base_url: str, session: Any = requests, *, stream: bool = False) -> int | str:
    """The status of a short request, or what its stream ended with instead of its end."""
    answer = session.post(
        f"{base_url}/v1/completions",
        json={
            "model": "smollm2-135m",
            "prompt": "The sea",
            "max_tokens": 8,
            "ignore_eos": True,
            "stream": stream,
        },
        stream=stream,
        timeout=60,
    )
    if answer.status_code == 200 and stream:
        *_, last = [line for line in answer.iter_lines() if line.startswith(b"data:")]
        return 200 if last == b"data: [DONE]" else str(last)
    return int(answer.status_code)


def test_new_servers_take_over_under_load(
    tmp_path: Path, cache_dir: Path, listener: socket.socket
) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=2)
    outcomes: Counter[int | str] = Counter()
    lock, done = threading.Lock(), threading.Event()

    def load(base_url: str, keeps_connection: bool, stream: bool) -> None:
        session: Any = requests.Session() if keeps_connection else requests
        while not done.is_set():
            try:
                outcome = complete(base_url, session, stream=stream)
            except requests.RequestException as error:
                outcome = repr(error)
            with lock:
                outcomes[outcome] += 1

    with ActivatedServer(path, listener) as first:
        # Nobody is turned away while the model loads: the connection waits.
        assert complete(first.base_url) == 200
        clients = [
            threading.Thread(target=load, args=(first.base_url, keeps, stream))
            for keeps in (True, False)
            for stream in (True, False)
        ]
        for client in clients:
            client.start()
        try:
            with ActivatedServer(path, listener) as second:
                _take_over(first, second, outcomes)
                with ActivatedServer(path, listener) as third:
                    _take_over(second, third, outcomes)
                    done.set()
                    for client in clients:
                        client.join(30)
                    assert third.stop() == 0
        finally:
            done.set()
    assert set(outcomes) == {200}, outcomes
    # What all of them did is in the ledger, once.
    assert len(ledger_rows(first)) == outcomes[200] + 1


def _take_over(old: ActivatedServer, new: ActivatedServer, outcomes: Counter[int | str]) -> None:
    new.wait_until_listening()
    assert old.stop(signal.SIGTERM) == 0
    before = outcomes[200]
    wait_for(lambda: outcomes[200] >= before + 20, "the new server answers")


def test_connections_wait_while_the_server_restarts(
    tmp_path: Path, cache_dir: Path, listener: socket.socket
) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=2)
    with ActivatedServer(path, listener) as first:
        first.wait_until_listening()
        first.stop()
    statuses: list[int | str] = []
    waiting = threading.Thread(target=lambda: statuses.append(complete(first.base_url)))
    waiting.start()
    with ActivatedServer(path, listener) as second:
        waiting.join(60)
        assert statuses == [200]
        assert second.stop() == 0


def test_what_is_no_socket_is_a_clear_error(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir)
    with (tmp_path / "file").open("w") as file:
        words = ["bash", "-c", _ACTIVATE, "bash", str(file.fileno())]
        result = subprocess.run(
            [*words, sys.executable, "-m", "serving", "serve", str(path)],
            capture_output=True, text=True, timeout=60, check=False, pass_fds=[file.fileno()],
        )  # fmt: skip
    assert result.returncode == 2
    assert "file descriptor 3 is no socket" in result.stderr
