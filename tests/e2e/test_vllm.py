"""A rig on a real vLLM: adapters, several clients at once, its own series, and starts that fail or find their length."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests

from tests.peft_files import write_peft
from tests.processes import RigServer, wait_for, write_config
from tests.vllm import MISSING, vllm_python

pytestmark = pytest.mark.timeout(900)

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


def a_lora(folder: Path, seed: int) -> Path:
    dice = np.random.default_rng(seed)

    def matrix(*shape: int) -> Any:
        return dice.normal(scale=0.3, size=shape).astype(np.float32)

    names = [f"model.layers.{layer}.self_attn.o_proj" for layer in range(4)]
    pairs = {name: (matrix(4, WIDTH), matrix(WIDTH, 4)) for name in names}
    return write_peft(folder, pairs, target_modules=["o_proj"])


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
    family = psutil.Process(own_rig.process.pid).children(recursive=True)
    lines = [child.cmdline() for child in family]
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
    path = a_config(tmp_path, cache_dir, python, context_length="auto", extra_args=small)
    with RigServer(path) as server:
        server.wait_until_ready(START_SECONDS)
        asked: Any = {"model": "smollm2-135m", "prompt": "sea " * 3000, "max_tokens": 2}
        refused = requests.post(f"{server.base_url}/v1/completions", json=asked, timeout=60)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert answer(server, "smollm2-135m")
