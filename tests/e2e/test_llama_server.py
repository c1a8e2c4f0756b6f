"""A rig on llama.cpp's own server: adapters, several clients at once, and starts that fail."""

from __future__ import annotations

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

import pytest
import requests

from tests.contract.engines import llama_server
from tests.lora_files import random_lora, write_lora
from tests.processes import RigServer, wait_for, write_config

ASKED: Any = {
    "messages": [{"role": "user", "content": "Tell me about the sea."}],
    "max_tokens": 8,
    "temperature": 0,
}
CHANGED = {f"blk.{layer}.attn_output.weight": (576, 576) for layer in range(4)}


@pytest.fixture(scope="module")
def program() -> str:
    found = llama_server()
    if found is None:
        pytest.skip("NOT TESTED: llama-server is not here; build it with: make bench-peers")
    return str(found)


@pytest.fixture(scope="module")
def own_rig(
    program: str, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path
) -> Iterator[RigServer]:
    folder = tmp_path_factory.mktemp("llama-server")
    adapters = [
        {
            "name": f"tuned-{seed}",
            "path": str(write_lora(folder / f"{seed}.gguf", random_lora(CHANGED, seed=seed))),
        }
        for seed in (1, 2)
    ]
    path = write_config(
        *(folder, cache_dir),
        engine="llama_server",
        binary=program,
        # In which one row and many are computed nearly alike.
        quantization="F16",
        adapters=adapters,
        max_sequences=4,
    )
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def answer(rig: RigServer, model: str) -> str:
    told = requests.post(
        f"{rig.base_url}/v1/chat/completions", json={**ASKED, "model": model}, timeout=60
    ).json()
    assert told["model"] == ("smollm2-135m" if model == "gpt-4o-mini" else model)
    text: str = told["choices"][0]["message"]["content"]
    return text


def test_adapters_answer_at_the_same_time_each_as_by_itself(own_rig: RigServer) -> None:
    models = ["gpt-4o-mini", "tuned-1", "tuned-2"]
    alone = [answer(own_rig, model) for model in models]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(6) as clients:
        together = list(clients.map(lambda model: answer(own_rig, model), models * 2))
    assert together == alone * 2


def test_an_adapter_is_added_and_removed_without_a_refused_request(own_rig: RigServer) -> None:
    """It takes them at its start only, so another one starts, and takes over."""
    path = Path(own_rig.config["models"][0]["adapters"][0]["path"])
    alone = answer(own_rig, "tuned-1")
    url = f"{own_rig.base_url}/admin/adapters"
    stop = threading.Event()

    def ask() -> list[str]:
        texts = []
        while not stop.is_set():
            texts.append(answer(own_rig, "tuned-2"))
        return texts

    with ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(ask) for _ in range(2)]
        body = {"name": "added", "model": "smollm2-135m", "path": str(path)}
        told = requests.post(url, json=body, timeout=100)
        assert told.status_code == 201, told.text
        assert answer(own_rig, "added") == alone
        assert requests.delete(f"{url}/added", timeout=100).status_code == 200
        stop.set()
        texts = [text for each in asked for text in each.result()]
    assert set(texts) == {answer(own_rig, "tuned-2")}
    assert len(texts) > 4


def rows_of(rig: RigServer) -> list[tuple[float, float]]:
    """Of each request in the ledger, for how long the engine had it, and how much of that it is charged."""
    with closing(sqlite3.connect(rig.ledger_path)) as ledger:
        return ledger.execute(
            "SELECT prefill_seconds + decode_seconds, prefill_busy_seconds + decode_busy_seconds "
            "FROM usage ORDER BY id"
        ).fetchall()


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


def test_what_it_counts_is_at_metrics(own_rig: RigServer) -> None:
    wait_for(lambda: own_rig.total("rigserve_requests_in_flight") == 0, "all is answered")
    running = own_rig.series("rigserve_sequences_running")
    assert running == {'{model="smollm2-135m"}': 0}
    assert own_rig.total("rigserve_prefix_hit_tokens_total") > 0
    assert own_rig.series("rigserve_kv_cache_used_tokens") == {}


def test_a_file_that_is_damaged_is_told_before_it_starts(
    program: str, tmp_path: Path, cache_dir: Path, model_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model_path.read_bytes()[:-1_000_000])
    told = failed_start(tmp_path, cache_dir, binary=program, source=str(cut), quantization=None)
    assert "cut.gguf: it ends early" in told
    assert "fetch it again" in told


def test_an_argument_that_it_does_not_know_is_told_with_the_mend(
    program: str, tmp_path: Path, cache_dir: Path
) -> None:
    told = failed_start(tmp_path, cache_dir, binary=program, extra_args=["--no-such-flag"])
    assert "it does not know the argument --no-such-flag; correct extra_args" in told


def test_an_adapter_of_another_model_is_told_before_it_starts(
    program: str, tmp_path: Path, cache_dir: Path
) -> None:
    other = write_lora(
        tmp_path / "other.gguf", random_lora({"blk.0.attn_q.weight": (64, 64)}, seed=3)
    )
    adapters = [{"name": "other", "path": str(other)}]
    told = failed_start(tmp_path, cache_dir, binary=program, adapters=adapters)
    assert "the adapter 'other'" in told


def failed_start(folder: Path, cache_dir: Path, **model: Any) -> str:
    """What `rigserve serve` prints when it cannot start."""
    path = write_config(folder, cache_dir, engine="llama_server", **model)
    ended = subprocess.run(
        [sys.executable, "-m", "serving", "serve", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr
