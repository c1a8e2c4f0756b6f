"""Models that load on demand and take turns, on real engines; and deadlines over HTTP."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.test_models import HELLO, engine_pids, models, states, write_models
from tests.processes import RigServer, wait_for

NAMES = ("a", "b", "c", "d")


def ask(
    rig: RigServer, model: str, *, headers: dict[str, str] | None = None, **fields: Any
) -> requests.Response:
    return requests.post(
        f"{rig.base_url}/v1/chat/completions",
        json={"model": model, "messages": HELLO, "max_tokens": 4, **fields},
        headers=headers,
        timeout=120,
    )


@pytest.mark.timeout(180)
def test_many_requests_for_more_models_than_have_room(tmp_path: Path, cache_dir: Path) -> None:
    # Each takes what it is told to, two of the four fit.
    path = write_models(
        tmp_path,
        cache_dir,
        {name: {"load": "on_demand", "memory_mib": 400, "context_length": 256} for name in NAMES},
        memory={"budget_mib": 900, "max_wait_seconds": 2.0},
    )
    dice, stop = random.Random(5), threading.Event()
    seen: list[list[str]] = []
    with RigServer(path) as rig:
        rig.wait_until_ready()

        def look() -> None:
            while not stop.wait(0.05):
                seen.append([name for name, _ in engine_pids(rig)])

        looking = threading.Thread(target=look)
        looking.start()
        asked = [dice.choice(NAMES) for _ in range(60)]
        with ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(lambda model: ask(rig, model), asked))
        stop.set()
        looking.join()

        assert [answer.status_code for answer in answers] == [200] * len(asked)
        assert [answer.json()["model"] for answer in answers] == asked
        assert max(map(len, seen)) == 2
        assert all(len(set(loaded)) == len(loaded) for loaded in seen), "none is loaded twice"
        loads = re.findall(r"(\w): ready", rig.output)
        assert set(loads) == set(NAMES)
        # Far fewer than if each request had its model loaded for it.
        assert len(loads) <= len(asked) / 3
        wait_for(lambda: rig.total("rigserve_requests_in_flight") == 0, "all are metered")
        assert rig.total("rigserve_admission_waiting") == 0
        assert rig.total("rigserve_admission_wait_seconds_count") == len(asked)
        rig.stop()
        ledger = sqlite3.connect(rig.ledger_path)
        counted, longest = ledger.execute(
            "SELECT count(*), max(queue_seconds) FROM usage"
        ).fetchone()
        ledger.close()
        assert counted == len(asked)
        # Each model has its turn after at most as many others, with their patience and their loads.
        assert 0.2 < longest < 60


@pytest.mark.timeout(120)
def test_requests_are_gathered_by_model(tmp_path: Path, cache_dir: Path) -> None:
    """A B A A C A B C, with room for one, takes three loads."""
    path = write_models(
        tmp_path,
        cache_dir,
        {name: {"load": "on_demand", "memory_mib": 400} for name in "ABC"},
        memory={"budget_mib": 500, "max_wait_seconds": 100.0},
    )
    served: list[str] = []
    with RigServer(path) as rig, ThreadPoolExecutor(8) as clients:
        rig.wait_until_ready()

        def one(model: str) -> int:
            status = ask(rig, model).status_code
            served.append(model)
            return status

        answers = [clients.submit(one, "A")]
        wait_for(lambda: engine_pids(rig), "the first begins to load")
        # It is held there, until all the others wait.
        [(_, pid)] = engine_pids(rig)
        os.kill(pid, signal.SIGSTOP)
        for number, model in enumerate("BAACABC", 1):
            answers.append(clients.submit(one, model))
            wait_for(lambda: rig.total("rigserve_admission_waiting") > number, "it waits")  # noqa: B023
        # One whose files are not prepared yet would let another go before it.
        wait_for(lambda: all(models(rig)[name]["memory"] for name in "BC"), "they are prepared")
        wait_for(
            lambda: states(rig) == {"A": "starting", "B": "unloaded", "C": "unloaded"},
            "none is being loaded but the first",
        )
        os.kill(pid, signal.SIGCONT)
        assert [answer.result() for answer in answers] == [200] * 8
        assert "".join(served) == "AAAABBCC"
        assert len(re.findall(r"(\w): ready", rig.output)) == 3


@pytest.mark.timeout(120)
def test_a_model_comes_on_demand_goes_after_its_ttl_and_says_why_it_cannot(
    tmp_path: Path, cache_dir: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    path = write_models(
        tmp_path,
        cache_dir,
        {
            "a": {"load": "on_demand", "ttl_seconds": 1.0},
            "broken": {"load": "on_demand", "source": str(broken), "quantization": None},
        },
    )
    with RigServer(path) as rig:
        rig.wait_until_ready()
        now = ask(rig, "a", headers={"x-rigserve-deadline-seconds": "0"})
        assert (now.status_code, now.json()["error"]["code"]) == (503, "model_not_ready")
        assert ask(rig, "a", headers={"x-rigserve-deadline-seconds": "soon"}).status_code == 400
        counted = requests.post(
            f"{rig.base_url}/tokenize", json={"model": "a", "prompt": "sea"}, timeout=60
        )
        assert counted.status_code == 200
        assert ask(rig, "a").status_code == 200
        wait_for(lambda: states(rig)["a"] == "unloaded", "its TTL is over")

        failed = ask(rig, "broken")
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "model_load_failed")
        assert str(tmp_path) not in failed.text
        assert int(failed.headers["retry-after"]) >= 1

        # One that hangs up while it waits leaves nothing behind.
        with pytest.raises(requests.Timeout):
            requests.post(
                f"{rig.base_url}/v1/chat/completions",
                json={"model": "a", "messages": HELLO},
                timeout=(5, 0.02),
            )
        wait_for(lambda: rig.total("rigserve_admission_waiting") == 0, "it has left")
        assert ask(rig, "a").status_code == 200
