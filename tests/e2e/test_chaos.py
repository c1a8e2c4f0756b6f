"""Engines are killed, or hang, at random under load: every request ends well or says why, and the counters add up.

`make chaos` runs it for minutes; RIGSERVE_CHAOS_SECONDS says how long, RIGSERVE_CHAOS_SEED repeats the dice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.e2e.test_models import engine_pids, states
from tests.processes import RigServer, wait_for, write_config

SECONDS = float(os.environ.get("RIGSERVE_CHAOS_SECONDS", "15"))
SEED = int(os.environ.get("RIGSERVE_CHAOS_SEED", "20261124"))
MODELS = ("left", "right")
CLIENTS = 6
# A client that was turned away does as it was told, but not for longer than the test wants to wait.
LONGEST_WAIT_SECONDS = 1.0


@dataclass
class Outcome:
    """What a client saw of a request. ``error`` is the code of the error that ended it."""

    request_id: str
    status: int
    error: str | None = None
    left: bool = False
    usage: dict[str, Any] | None = None


@dataclass
class Client:
    """Sends requests one after another until told to stop."""

    base_url: str
    number: int
    stop: threading.Event
    dice: random.Random
    outcomes: list[Outcome] = field(default_factory=list)
    fault: BaseException | None = None

    def run(self) -> None:
        try:
            with requests.Session() as session:
                while not self.stop.is_set():
                    self.outcomes.append(self.one(session))
        except BaseException as fault:
            self.fault = fault

    def one(self, session: requests.Session) -> Outcome:
        dice, request_id = self.dice, f"chaos-{self.number}-{len(self.outcomes)}"
        streamed, leaves = dice.random() < 0.6, dice.random() < 0.15
        answer = session.post(
            f"{self.base_url}/v1/chat/completions",
            headers={"x-request-id": request_id},
            json={
                "model": dice.choice(MODELS),
                "messages": [{"role": "user", "content": "Count. " * dice.randint(1, 60)}],
                "max_tokens": dice.randint(1, 60),
                "ignore_eos": True,
                "stream": streamed,
                "stream_options": {"include_usage": True} if streamed else None,
                "service_tier": dice.choice([None, "flex"]),
            },
            stream=True,
            timeout=60,
        )
        with answer:
            if answer.status_code != 200:
                assert int(answer.headers["retry-after"]) > 0
                self.stop.wait(min(int(answer.headers["retry-after"]), LONGEST_WAIT_SECONDS))
                code = answer.json()["error"]["code"]
                return Outcome(request_id, answer.status_code, code)
            if leaves and streamed:
                next(answer.iter_lines(), None)
                return Outcome(request_id, 200, left=True)
            if not streamed:
                return Outcome(request_id, 200, usage=answer.json()["usage"])
            return read_stream(request_id, answer)


def read_stream(request_id: str, answer: requests.Response) -> Outcome:
    """A stream ends with its usage and [DONE], or with an error event; nothing follows either."""
    events = [line.removeprefix(b"data: ") for line in answer.iter_lines() if line[:5] == b"data:"]
    if events[-1] != b"[DONE]":
        return Outcome(request_id, 200, json.loads(events[-1])["error"]["code"])
    assert all(b'"error"' not in event for event in events)
    return Outcome(request_id, 200, usage=json.loads(events[-2])["usage"])


@pytest.fixture
def own_rig(tmp_path: Path, cache_dir: Path) -> Iterator[RigServer]:
    """Two models, each with an engine of its own that the test may kill."""
    path = write_config(tmp_path, cache_dir, aliases=[], max_sequences=4, step_timeout_seconds=8)
    config = yaml.safe_load(path.read_text())
    [model] = config["models"]
    config["models"] = [{**model, "name": name} for name in MODELS]
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def break_engines(rig: RigServer, dice: random.Random, seconds: float) -> Counter[signal.Signals]:
    """Kill an engine, or stop it, every now and then; returns how many, by signal."""
    sent: Counter[signal.Signals] = Counter()
    stopped: set[int] = set()
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        time.sleep(dice.uniform(0.5, 4.0))
        loaded = states(rig)
        # A start that hangs is noticed only after its own, longer time.
        engines = [(name, pid) for name, pid in engine_pids(rig) if pid not in stopped]
        if engines:
            name, pid = dice.choice(engines)
            # One of each at least.
            hangs = not sent[signal.SIGSTOP] or (sent[signal.SIGKILL] and dice.random() < 0.4)
            number = signal.SIGKILL
            if hangs and loaded[name] == "ready":
                number = signal.SIGSTOP
                stopped.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                sent[number] += 1
    return sent


# Beside the chaos itself: the start, the last answers, and restarts with their backoff.
@pytest.mark.timeout(180 + SECONDS)
def test_chaos(own_rig: RigServer) -> None:
    dice, stop = random.Random(SEED), threading.Event()
    clients = [
        Client(own_rig.base_url, number, stop, random.Random(dice.random()))
        for number in range(CLIENTS)
    ]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    broken = break_engines(own_rig, dice, SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    restarts = "rigserve_engine_restarts"
    wait_for(lambda: own_rig.total(restarts) == broken.total(), "all deaths are noticed", 60)
    own_rig.wait_until_ready()
    wait_for(lambda: own_rig.total("rigserve_requests_in_flight") == 0, "all are metered")

    assert [client.fault for client in clients] == [None] * CLIENTS
    outcomes = {outcome.request_id: outcome for client in clients for outcome in client.outcomes}
    wait_for(lambda: _counted(own_rig) == len(outcomes), "every request is counted once")
    assert broken[signal.SIGKILL]
    assert broken[signal.SIGSTOP]
    assert own_rig.total(restarts) == broken.total()
    assert {(outcome.status, outcome.error) for outcome in outcomes.values()} <= {
        (200, None),
        (200, "engine_stopped"),
        (503, "engine_stopped"),
        (503, "model_not_ready"),
    }
    assert sum(outcome.usage is not None for outcome in outcomes.values()) > CLIENTS

    rows = _ledger(own_rig)
    assert not [
        name for name, count in Counter(row["request_id"] for row in rows).items() if count > 1
    ]
    by_id = {row["request_id"]: row for row in rows}
    for outcome in outcomes.values():
        _agrees(outcome, by_id.pop(outcome.request_id, None))
    assert not by_id
    for column in ("prompt_tokens", "cached_tokens", "completion_tokens"):
        counted = own_rig.total(f"rigserve_{column}_total")
        assert counted == sum(row[column] for row in rows), column

    for name in ("rigserve_sequences_running", "rigserve_requests_queued"):
        assert _is_idle(own_rig, name)


def _is_idle(rig: RigServer, name: str) -> bool:
    series = rig.series(name)
    assert len(series) >= len(MODELS)
    return not any(series.values())


def _agrees(outcome: Outcome, row: dict[str, Any] | None) -> None:
    """What a client saw is what the ledger has of it."""
    if outcome.usage is not None:
        assert row is not None
        assert (row["status"], row["tokens_source"]) == (200, "engine")
        told = outcome.usage["prompt_tokens"], outcome.usage["completion_tokens"]
        assert (row["prompt_tokens"], row["completion_tokens"]) == told
    elif outcome.left:
        # It may have ended, or its engine died, before the client's leaving was noticed.
        assert row is not None
        assert row["status"] in (200, 499, 500)
    elif outcome.error == "engine_stopped":
        assert row is not None
        assert row["status"] == (503 if outcome.status == 503 else 500)
    else:
        assert row is None


def _counted(rig: RigServer) -> float:
    return sum(
        count
        for labels, count in rig.series("rigserve_requests_total").items()
        if "/v1/chat/completions" in labels
    )


def _ledger(rig: RigServer) -> list[dict[str, Any]]:
    time.sleep(1.5)  # it is written once a second
    with contextlib.closing(sqlite3.connect(rig.ledger_path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM usage")]
