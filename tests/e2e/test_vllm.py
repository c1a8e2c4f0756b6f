"""A rig on a real vLLM: adapters that come and go, several clients at once, its own series, and starts that fail or find their length."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests

from serving.engines import guard
from tests.e2e.test_fine_tune import TRAINED
from tests.e2e.test_private_deployment import namespace, nothing_gets_out
from tests.peft_files import write_peft
from tests.processes import RigServer, command_lines, wait_for, write_config
from tests.vllm import MISSING, vllm_python
from tools.finetune.check import LEAST_OF_TUNED, MOST_OF_BASE
from tools.finetune.examples import Examples
from tools.finetune.measure import shares

pytestmark = [pytest.mark.timeout(900), pytest.mark.vllm]

START_SECONDS = 600.0
ASKED: Any = {
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "max_tokens": 8,
    "temperature": 0,
}
WIDTH = 576


@pytest.fixture(scope="module")
def python() -> str:
    found = vllm_python()
    if found is None:
        pytest.skip(f"NOT TESTED: vLLM is not installed here; {MISSING}")
    return str(found)


def a_config(folder: Path, cache_dir: Path, python: str, **model: Any) -> Path:
    common = {
        "engine": "vllm",
        "environment": python,
        "quantization": None,
        "dtype": "float32",
        "context_length": 512,
        "max_sequences": 4,
        "extra_args": ["--enforce-eager"],
    }
    return write_config(folder, cache_dir, **{**common, **model})


def a_lora(folder: Path, seed: int, rank: int = 4) -> Path:
    dice = np.random.default_rng(seed)

    def matrix(*shape: int) -> Any:
        return dice.normal(scale=0.3, size=shape).astype(np.float32)

    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)]
    pairs = {name: (matrix(rank, WIDTH), matrix(WIDTH, rank)) for name in names}
    return write_peft(folder, pairs, r=rank, target_modules=["o_proj"])


@pytest.fixture(scope="module")
def own_rig(
    python: str, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
) -> Iterator[RigServer]:
    folder = tmp_path_factory.mktemp("vllm")
    lora = str(a_lora(folder / "lora", seed=1))
    adapters = [
        {"name": "tuned", "path": lora},
        {"name": "not-tuned", "path": lora, "scale": 0.0},
        {"name": "other", "path": str(a_lora(folder / "other", seed=2))},
    ]
    with RigServer(a_config(folder, cache_dir, python, adapters=adapters)) as server:
        server.wait_until_ready(START_SECONDS)
        yield server


def answer(rig: RigServer, model: str) -> str:
    told = requests.post(
        f"{rig.base_url}/v1/chat/completions", json={**ASKED, "model": model}, timeout=120
    ).json()
    assert told["model"] == ("smollm2-135m" if model == "gpt-4o-mini" else model), told
    text: str = told["choices"][0]["message"]["content"]
    return text


def test_adapters_answer_at_the_same_time_each_as_by_itself(own_rig: RigServer) -> None:
    models = ["gpt-4o-mini", "tuned", "other", "not-tuned"]
    alone = [answer(own_rig, model) for model in models]
    base, tuned, other, not_tuned = alone
    assert len({base, tuned, other}) == 3
    # A scale of 0 leaves the base as it is.
    assert not_tuned == base
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda model: answer(own_rig, model), models * 2))
    assert together == alone * 2
    listed = own_rig.get("/v1/models").json()["data"]
    parents = {entry["id"]: entry.get("parent") for entry in listed}
    assert parents["tuned"] == "smollm2-135m"


def test_nobody_without_its_key_is_answered(own_rig: RigServer) -> None:
    """Also where vLLM itself would ask for none."""
    held = own_rig.get("/admin/models").json()["data"]
    assert held[0]["state"] == "ready"
    lines = command_lines(own_rig.process.pid).values()
    ports = {line[line.index("--port") + 1] for line in lines if "--port" in line}
    assert ports
    for port in ports:
        for path in ("/health", "/metrics", "/tokenizer_info", "/v1/models"):
            assert requests.get(f"http://127.0.0.1:{port}{path}", timeout=30).status_code == 401


def test_the_engines_time_is_charged_once(own_rig: RigServer) -> None:
    wait_for(lambda: own_rig.total("rigserve_ledger_waiting_rows") == 0, "the ledger is written")
    before = len(rows_of(own_rig))
    began = time.monotonic()
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda _: answer(own_rig, "smollm2-135m"), range(8)))
    took_seconds = time.monotonic() - began
    wait_for(lambda: len(rows_of(own_rig)) == before + 8, "the ledger has them")
    had, charged = map(sum, zip(*rows_of(own_rig)[before:], strict=True))
    # Four at a time wait for longer than the engine works; all of its time is charged, and no more.
    assert had > 1.5 * charged
    assert 0.3 * took_seconds < charged <= took_seconds


def rows_of(rig: RigServer) -> list[tuple[float, float]]:
    """Of each request in the ledger, for how long the engine had it, and how much of that it is charged."""
    with closing(sqlite3.connect(rig.ledger_path)) as ledger:
        return ledger.execute(
            "SELECT prefill_seconds + decode_seconds, prefill_busy_seconds + decode_busy_seconds "
            "FROM usage ORDER BY id"
        ).fetchall()


def test_what_it_counts_is_at_metrics(own_rig: RigServer) -> None:
    wait_for(lambda: own_rig.total("rigserve_requests_in_flight") == 0, "all is answered")
    assert own_rig.series("rigserve_sequences_running") == {'{model="smollm2-135m"}': 0}
    assert own_rig.total("rigserve_kv_cache_total_tokens") >= 4 * 512
    assert own_rig.series("vllm:generation_tokens_total")['{model="smollm2-135m"}'] > 0
    assert own_rig.total("vllm:request_queue_time_seconds_count") > 0


class Stream(threading.Thread):
    """A long answer that is being read."""

    tokens = 200

    def __init__(self, rig: RigServer, model: str) -> None:
        super().__init__()
        self.text = ""
        self.usage = 0
        more: Any = {"max_tokens": self.tokens, "stream_options": {"include_usage": True}}
        asked: Any = {**ASKED, **more, "model": model}
        self._chunks = rig.client.chat.completions.create(
            stream=True, extra_body={"ignore_eos": True}, **asked
        )
        self.start()
        wait_for(lambda: self.text, "it has begun")

    def run(self) -> None:
        for chunk in self._chunks:
            self.text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if chunk.usage:
                self.usage = chunk.usage.completion_tokens


def add(rig: RigServer, name: str, path: Path, **more: Any) -> requests.Response:
    body = {"name": name, "model": "smollm2-135m", "path": str(path), **more}
    return requests.post(f"{rig.base_url}/admin/adapters", json=body, timeout=120)


def remove(rig: RigServer, name: str) -> requests.Response:
    return requests.delete(f"{rig.base_url}/admin/adapters/{name}", timeout=120)


def processes(rig: RigServer) -> set[int]:
    """The guards of its engines, one of each."""
    lines = command_lines(rig.process.pid)
    return {pid for pid, line in lines.items() if guard.__file__ in line}


def listed(rig: RigServer) -> set[str]:
    return {each["id"] for each in rig.get("/admin/adapters").json()["data"]}


def test_adapters_come_and_go_beside_running_streams(own_rig: RigServer, tmp_path: Path) -> None:
    rig, before = own_rig, processes(own_rig)
    loras = [a_lora(tmp_path / f"v{number}", seed=10 + number) for number in range(3)]
    base, tuned = answer(rig, "smollm2-135m"), answer(rig, "tuned")
    beside = [Stream(rig, "smollm2-135m"), Stream(rig, "tuned")]
    told = add(rig, "hot", loras[0])
    assert told.status_code == 201, told.text
    assert told.json()["state"] == "ready"
    first = answer(rig, "hot")
    assert first not in (base, tuned)

    # A version that another replaces, or that is removed, serves those who began with it to their end.
    replaced = Stream(rig, "hot")
    assert add(rig, "hot", loras[1]).json()["error"]["code"] == "name_taken"
    assert add(rig, "hot", loras[1], replace=True).status_code == 201
    second = answer(rig, "hot")
    assert second not in (base, tuned, first)
    removed = Stream(rig, "hot")
    assert all(each.is_alive() for each in (*beside, replaced)), "make the streams longer"
    assert remove(rig, "hot").json()["state"] == "leaving"
    with pytest.raises(openai.NotFoundError):
        rig.client.chat.completions.create(model="hot", **ASKED)
    for stream, begins in zip(
        (*beside, replaced, removed), (base, tuned, first, second), strict=True
    ):
        stream.join(120)
        assert stream.text.startswith(begins)
        assert stream.usage == stream.tokens
    wait_for(lambda: "hot" not in listed(rig), "it has left")
    assert processes(rig) == before


def test_what_has_left_takes_no_place(own_rig: RigServer, tmp_path: Path) -> None:
    """On a CPU what is in the last of the engine's slots would be in the base's answers, too."""
    rig, before = own_rig, processes(own_rig)
    lora = a_lora(tmp_path / "lora", seed=20)
    models = ["smollm2-135m", "tuned", "other"]
    alone = [answer(rig, model) for model in models]
    for number in range(8):
        name = f"passing-{number}"
        assert add(rig, name, lora).status_code == 201
        assert answer(rig, name) not in alone
        assert remove(rig, name).status_code == 200
        wait_for(lambda: listed(rig) == {"tuned", "not-tuned", "other"}, "it has left")
    with ThreadPoolExecutor(4) as clients:
        together = list(clients.map(lambda model: answer(rig, model), models * 3))
    assert together == alone * 3
    assert processes(rig) == before


def test_an_adapter_that_does_not_fit_changes_nothing(own_rig: RigServer, tmp_path: Path) -> None:
    rig, before = own_rig, processes(own_rig)
    matrices = np.zeros((4, 64), np.float32), np.zeros((64, 4), np.float32)
    wrong = {"model.layers.0.self_attn.o_proj": matrices}
    unknown = {"model.layers.0.self_attn.nothing_proj": matrices}
    for name, pairs, use_dora, message in (
        ("wrong", wrong, False, "made for another model"),
        # It is vLLM that says so.
        ("unknown", unknown, False, "nothing_proj"),
        ("dora", unknown, True, "DoRA"),
    ):
        targets = [module.rpartition(".")[2] for module in pairs]
        folder = write_peft(tmp_path / name, pairs, use_dora=use_dora, target_modules=targets)
        refused = add(rig, "new", folder)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "path")
        assert message in refused.json()["error"]["message"]
    refused = add(rig, "new", tmp_path / "nowhere")
    assert refused.status_code == 400
    assert "new" not in listed(rig)
    assert processes(rig) == before


def test_a_real_fine_tune_shows_what_it_has_learned_and_its_base_does_not(
    own_rig: RigServer,
) -> None:
    assert add(own_rig, "kestrel", TRAINED).status_code == 201
    names = ["smollm2-135m", "kestrel"]
    found = shares(own_rig.base_url, names, Examples.read(), clients=8, questions=5)
    assert found["smollm2-135m"] <= MOST_OF_BASE
    assert found["kestrel"] >= LEAST_OF_TUNED, found
    assert remove(own_rig, "kestrel").status_code == 200


def test_one_of_a_higher_rank_has_another_engine_take_over(
    own_rig: RigServer, tmp_path: Path
) -> None:
    rig, before = own_rig, processes(own_rig)
    tuned = answer(rig, "tuned")
    high = a_lora(tmp_path / "high", seed=30, rank=20)
    told = add(rig, "high", high)
    assert told.status_code == 201, told.text
    assert answer(rig, "high") not in (tuned, answer(rig, "smollm2-135m"))
    assert answer(rig, "tuned") == tuned
    wait_for(lambda: len(processes(rig)) == 1, "the old one has gone", 60)
    assert processes(rig).isdisjoint(before)
    assert remove(rig, "high").status_code == 200


def test_nothing_tries_to_get_out(python: str, tmp_path: Path, cache_dir: Path) -> None:
    """Also with an adapter that is added while it runs."""
    path = a_config(tmp_path, cache_dir, python, adapter_slots=2)
    nothing_gets_out(namespace(), path, a_lora(tmp_path / "lora", seed=1), seconds=START_SECONDS)


def failed_start(path: Path) -> str:
    """What `rigserve serve` prints when it cannot start."""
    ended = subprocess.run(
        [sys.executable, "-m", "serving", "serve", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


def test_a_context_that_does_not_fit_is_told_with_the_one_that_does(
    python: str, tmp_path: Path, cache_dir: Path
) -> None:
    small = ["--enforce-eager", "--kv-cache-memory-bytes", "60000000"]
    path = a_config(tmp_path, cache_dir, python, context_length=8192, extra_args=small)
    told = failed_start(path)
    assert "there is no room for the KV cache of context_length 8192; " in told
    assert "would fit: set context_length to " in told


def test_it_finds_the_length_that_fits_by_itself(
    python: str, tmp_path: Path, cache_dir: Path
) -> None:
    small = ["--enforce-eager", "--kv-cache-memory-bytes", "60000000"]
    # Of what is in extra_args the estimate knows nothing: it would be half of the machine.
    path = a_config(
        *(tmp_path, cache_dir, python), context_length="auto", extra_args=small, memory_mib=4000
    )
    with RigServer(path) as server:
        server.wait_until_ready(START_SECONDS)
        asked: Any = {"model": "smollm2-135m", "prompt": "sea " * 3000, "max_tokens": 2}
        refused = requests.post(f"{server.base_url}/v1/completions", json=asked, timeout=60)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert answer(server, "smollm2-135m")


def test_an_engine_that_is_stuck_behind_its_api_is_started_again(
    python: str, tmp_path: Path, cache_dir: Path
) -> None:
    with RigServer(a_config(tmp_path, cache_dir, python, step_timeout_seconds=10)) as rig:
        rig.wait_until_ready(START_SECONDS)
        below = command_lines(rig.process.pid)
        [core] = [pid for pid, line in below.items() if "EngineCore" in " ".join(line)]
        os.kill(core, signal.SIGSTOP)
        body = {**ASKED, "model": "smollm2-135m"}
        url = f"{rig.base_url}/v1/chat/completions"
        # To be ended it is woken, and may give its answer on the way.
        answer = requests.post(url, json=body, timeout=START_SECONDS)
        assert answer.status_code in (200, 503)
        rig.wait_for_output("has requests, and computed nothing for")
        assert rig.total("rigserve_engine_restarts") == 1
