"""A disk without room and a locked database, under load: no row is lost, and none is there twice."""

from __future__ import annotations

import resource
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import requests

from tests.processes import RigServer, wait_for, write_config
from tests.unit.test_ledger import locked_by_another_process

CLIENTS = 3


class Load:
    """Clients that send short requests, one after another, each under an id of its own."""

    def __init__(self, rig: RigServer) -> None:
        self.answered: list[str] = []
        self.others: list[str] = []
        self._rig = rig
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Send no more, and wait for the last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: int) -> None:
        sent = 0
        while not self._stop.is_set():
            name, sent = f"load-{client}-{sent}", sent + 1
            answer = requests.post(
                f"{self._rig.base_url}/v1/completions",
                json={"model": "smollm2-135m", "prompt": "The sea", "max_tokens": 2},
                headers={"x-request-id": name},
                timeout=60,
            )
            if answer.status_code == 200:
                self.answered.append(name)
            else:
                self.others.append(answer.text)


@contextmanager
def no_room_on_the_disk(rig: RigServer) -> Iterator[None]:
    """The server can write to no file: each write fails as it does when a disk is full."""
    limits = resource.prlimit(rig.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(rig.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(rig.process.pid, resource.RLIMIT_FSIZE, limits)


def waiting_rows(rig: RigServer) -> float:
    return rig.total("rigserve_ledger_waiting_rows")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process: Linux only")
@pytest.mark.timeout(180)
def test_rows_are_neither_lost_nor_doubled(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=4)
    with RigServer(path) as rig:
        rig.wait_until_ready()
        with Load(rig) as load:
            wait_for(lambda: len(load.answered) > 10, "they are answered")
            with no_room_on_the_disk(rig):
                answered = len(load.answered)
                wait_for(lambda: waiting_rows(rig) > 10, "rows wait in memory")
                wait_for(lambda: len(load.answered) > answered + 20, "requests go on")
            rig.wait_for_output("can be written again", 60)
            with locked_by_another_process(rig.ledger_path):
                spool = rig.ledger_path.with_suffix(".spool")
                wait_for(lambda: list(spool.glob("*.jsonl")), "rows are spooled")
                load.end()
                wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "all are metered")
                counted = rig.total("rigserve_requests_total")
                prompt_tokens = rig.total("rigserve_prompt_tokens_total")
                assert rig.stop(seconds=60) == 0
        assert "Traceback" not in rig.output
        with closing(sqlite3.connect(rig.ledger_path)) as ledger:
            (before,) = ledger.execute("SELECT count(*) FROM usage").fetchone()
        assert before < len(load.answered), "some wait in the spool"
    with RigServer(path) as rig:
        rig.wait_until_ready()
        assert rig.stop() == 0
    assert not load.others
    assert counted == len(load.answered)
    with closing(sqlite3.connect(rig.ledger_path)) as ledger:
        rows = ledger.execute("SELECT request_id, prompt_tokens FROM usage").fetchall()
    assert Counter(name for name, _ in rows) == Counter(load.answered)
    assert sum(tokens for _, tokens in rows) == prompt_tokens
    assert not list(spool.iterdir())
