"""Engines on two nodes of a real Ray cluster: more and fewer of them by load, a node lost, a new one, and renewal under load.

Ray is told of cards, by which it places engines; there are none, and engines compute on the CPU all the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from tests.e2e.test_reload import rewrite
from tests.processes import RigServer, wait_for, write_config

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rigserve[cluster]'")

MODEL = "smollm2-135m"
WAIT_SECONDS = 120.0
# More than half of a card's memory is one engine's: each card has one.
NODE: Any = {"labels": {"rigserve/gpu-mib": "1200"}, "object_store_memory": 80 * 2**20}
RELOADED = "rigserve_config_last_reload_success_timestamp_seconds"

NUMBERS = itertools.count()

pytestmark = pytest.mark.timeout(400)


class ClusterServer(RigServer):
    """``rigserve cluster serve CONFIG``."""

    def __init__(self, config_path: Path) -> None:
        super().__init__(config_path)
        self._command = [sys.executable, "-m", "serving", "cluster", "serve", str(config_path)]

    def ready(self) -> set[str]:
        """The replicas that take requests."""
        return {
            labels.partition('model="')[2].rstrip('"}')
            for labels, value in self.series("rigserve_engine_ready").items()
            if value
        }


@dataclass
class Outcome:
    """What a client saw of a stream: from where it came, its usage, or the error that ended it."""

    request_id: str
    status: int
    replica: str | None = None
    usage: dict[str, Any] | None = None
    error: str | None = None


@dataclass
class Crowd:
    """Clients who each send one stream after another, ``count`` of them, or until told to stop."""

    rig: RigServer
    clients: int
    max_tokens: int
    count: int | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._faults: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(self.clients)]
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Outcome]:
        """Let all finish what they have begun."""
        if self.count is None:
            self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
        assert not self._faults
        assert not any(thread.is_alive() for thread in self._threads)
        return self.outcomes

    def _run(self) -> None:
        try:
            for turn in itertools.count():
                if self._stop.is_set() or turn == self.count:
                    return
                self.outcomes.append(self._one(f"cluster-{next(NUMBERS)}"))
        except BaseException as fault:
            self._faults.append(fault)

    def _one(self, request_id: str) -> Outcome:
        body: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell me of {request_id}."}],
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        url, headers = f"{self.rig.base_url}/v1/chat/completions", {"x-request-id": request_id}
        with requests.post(url, json=body, headers=headers, stream=True, timeout=100) as answer:
            if answer.status_code != 200:
                code = answer.json()["error"]["code"]
                return Outcome(request_id, answer.status_code, error=code)
            replica = answer.headers["x-rigserve-model"]
            lines = [line for line in answer.iter_lines() if line.startswith(b"data: ")]
            events = [line.removeprefix(b"data: ") for line in lines]
            if events[-1] != b"[DONE]":
                error = json.loads(events[-1])["error"]["code"]
                return Outcome(request_id, 200, replica, error=error)
            last = json.loads(events[-2])
            assert last["model"] == MODEL
            return Outcome(request_id, 200, replica, usage=last["usage"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with room for two engines; nodes come and go."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "num_gpus": 2, "include_dashboard": False, **NODE},
        )
        try:
            yield made
        finally:
            made.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, num_gpus=1, **NODE)


def cut_off(cluster: Any, node: Any) -> None:
    """End everything on a node at once, as a power cut does."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)


def status(config: Path) -> str:
    """What `rigserve cluster status` prints."""
    command = [sys.executable, "-m", "serving", "cluster", "status", str(config)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def ledger(rig: RigServer, outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """The ledger's rows of these requests: one of each that was answered."""
    wanted = {each.request_id for each in outcomes if each.status == 200}

    def rows() -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(rig.ledger_path)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM usage")]

    wait_for(lambda: wanted <= {row["request_id"] for row in rows()}, "all is in the ledger", 60)
    ours = [row for row in rows() if row["request_id"] in {each.request_id for each in outcomes}]
    assert max(Counter(row["request_id"] for row in ours).values()) == 1
    return {row["request_id"]: row for row in ours}


def check_metering(rig: RigServer, outcomes: list[Outcome]) -> None:
    """What clients saw is what the ledger has, under the model's own name."""
    rows = ledger(rig, outcomes)
    for outcome in outcomes:
        row = rows.get(outcome.request_id)
        if outcome.usage is not None:
            assert row is not None
            told = outcome.usage["prompt_tokens"], outcome.usage["completion_tokens"]
            assert (row["prompt_tokens"], row["completion_tokens"]) == told
            assert (row["status"], row["tokens_source"]) == (200, "engine")
            # No meter sees the nodes.
            assert (row["model"], row["energy_source"]) == (MODEL, "estimated")
        elif row is not None:
            assert row["status"] in (500, 503)


def test_a_cluster(cluster: Any, tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, max_sequences=2, replicas=1, max_replicas=2)
    config = yaml.safe_load(path.read_text())
    config["cluster"] = {"address": cluster.address}
    config["scaling"] = {"waiting_requests": 1, "up_after_seconds": 0, "down_after_seconds": 1}
    path.write_text(yaml.safe_dump(config))
    node = add_node(cluster)
    with ClusterServer(path) as rig:
        try:
            rig.wait_until_ready(WAIT_SECONDS)
            everything = grows_and_shrinks(rig)
            config["models"][0]["replicas"] = 2
            rewrite(rig, config)
            wait_for(lambda: len(rig.ready()) == 2, "two replicas are ready", WAIT_SECONDS)
            assert len(re.findall(r"#[12] \(0\.6\d+ cards, ", status(path))) == 2
            everything += survives_a_node(rig, cluster, node)
            add_node(cluster)
            everything += is_renewed(rig, config)
            check_metering(rig, everything)
            counted = rig.total("rigserve_completion_tokens_total")
            assert counted == sum(
                row["completion_tokens"] for row in ledger(rig, everything).values()
            )
            assert [model.id for model in rig.client.models.list()] == [MODEL, "gpt-4o-mini"]
        except BaseException:
            print(rig.output)
            raise


def grows_and_shrinks(rig: ClusterServer) -> list[Outcome]:
    """While requests wait there are two replicas; when there is nothing to do, one."""
    assert rig.ready() == {f"{MODEL}#1"}
    crowd = Crowd(rig, clients=8, max_tokens=48)
    wait_for(lambda: len(rig.ready()) == 2, "there is one more replica", WAIT_SECONDS)
    seen = len(crowd.outcomes)
    wait_for(
        lambda: {each.replica for each in crowd.outcomes[seen:]} == {f"{MODEL}#1", f"{MODEL}#2"},
        "both have work",
        WAIT_SECONDS,
    )
    outcomes = crowd.end()
    assert not [each for each in outcomes if each.usage is None]
    wait_for(lambda: len(rig.ready()) == 1, "one replica is left", WAIT_SECONDS)
    return outcomes


def survives_a_node(rig: ClusterServer, cluster: Any, node: Any) -> list[Outcome]:
    """Only streams that the lost node had break off, with an error; a new replica takes its place."""
    crowd = Crowd(rig, clients=6, max_tokens=250, count=1)
    wait_for(lambda: rig.total("rigserve_sequences_running") == 4, "both are at work", WAIT_SECONDS)
    restarts = rig.series("rigserve_engine_restarts")
    cut_off(cluster, node)
    outcomes = crowd.end()
    broken = {each.replica for each in outcomes if each.error == "engine_stopped"}
    assert len(broken) == 1
    assert None not in broken
    whole = {each.replica for each in outcomes if each.usage is not None}
    # Those that waited for the lost one go to the other, or to the one in its place.
    assert whole - broken
    assert all(each.usage or each.replica in broken for each in outcomes)
    wait_for(lambda: len(rig.ready()) == 2, "the lost replica is replaced", WAIT_SECONDS)
    after = rig.series("rigserve_engine_restarts")
    assert {labels for labels in after if after[labels] > restarts[labels]} == {
        f'{{model="{each}"}}' for each in broken
    }
    return outcomes


def is_renewed(rig: ClusterServer, config: dict[str, Any]) -> list[Outcome]:
    """Replicas change one by one; no request fails meanwhile."""
    crowd = Crowd(rig, clients=3, max_tokens=24)
    wait_for(lambda: len(crowd.outcomes) > 3, "requests come", WAIT_SECONDS)
    before = rig.total(RELOADED)
    config["models"][0]["max_sequences"] = 3
    rewrite(rig, config)
    wait_for(lambda: rig.total(RELOADED) > before, "the config is taken up", WAIT_SECONDS)
    seen = len(crowd.outcomes)
    wait_for(lambda: len(crowd.outcomes) > seen + 3, "requests go on", WAIT_SECONDS)
    outcomes = crowd.end()
    assert not [each for each in outcomes if each.usage is None]
    assert rig.output.count(": 3 sequences of") == 2
    return outcomes
