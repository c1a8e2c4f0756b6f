"""What each engine's requests used is in the ledger as the engine measured it."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from typing import Any

import pytest
import requests

from tests.contract.engines import CHAT, EMBEDDING, ContractServer
from tests.contract.probes import HELLO
from tests.processes import wait_for

ASKED: Any = {"model": CHAT, "messages": HELLO, "max_tokens": 8, "temperature": 0}


def last_row(contract: ContractServer, request_id: str) -> sqlite3.Row:
    """The ledger's row of a request; it is written a moment after the answer."""
    found: list[sqlite3.Row] = []

    def is_there() -> bool:
        with closing(sqlite3.connect(contract.ledger_path)) as ledger:
            ledger.row_factory = sqlite3.Row
            found[:] = ledger.execute(
                "SELECT * FROM usage WHERE request_id = ?", (request_id,)
            ).fetchall()
        return bool(found)

    wait_for(is_there, "the request is in the ledger")
    [row] = found
    return row


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_times_are_the_engines(contract: ContractServer, stream: bool) -> None:
    name = f"metered-{contract.engine.name}-{stream}-{time.time_ns()}"
    began = time.monotonic()
    answer = requests.post(
        f"{contract.base_url}/v1/chat/completions",
        json={**ASKED, "stream": stream},
        headers={"x-request-id": name},
        timeout=60,
    )
    took_seconds = time.monotonic() - began
    assert answer.status_code == 200, answer.text
    row = last_row(contract, name)
    assert (row["engine"], row["completion_tokens"]) == (contract.engine.engine, 8)
    assert row["prompt_tokens"] > row["cached_tokens"] >= 0
    assert row["tokens_source"] == "engine"
    if not contract.engine.is_remote or contract.engine.model["dialect"] == "rigserve":
        assert row["timing_source"] == "engine"
    assert 0 < row["prefill_seconds"] + row["decode_seconds"] <= took_seconds
    busy_seconds = row["prefill_busy_seconds"] + row["decode_busy_seconds"]
    if contract.engine.is_remote:
        assert busy_seconds == 0
    else:
        # One request by itself has all of the engine's time.
        assert busy_seconds > 0.5 * (row["prefill_seconds"] + row["decode_seconds"])
        assert busy_seconds <= took_seconds


@pytest.mark.needs("embeddings")
def test_embeddings_are_metered(contract: ContractServer) -> None:
    name = f"metered-{contract.engine.name}-embedding-{time.time_ns()}"
    answer = requests.post(
        f"{contract.base_url}/v1/embeddings",
        json={"model": EMBEDDING, "input": ["A cat.", "A rug."]},
        headers={"x-request-id": name},
        timeout=60,
    )
    row = last_row(contract, name)
    assert row["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"] > 0


@pytest.mark.needs("ignore_eos")
def test_who_hangs_up_pays_for_what_there_was(contract: ContractServer) -> None:
    name = f"left-{contract.engine.name}-{time.time_ns()}"
    with requests.post(
        f"{contract.base_url}/v1/chat/completions",
        json={**ASKED, "stream": True, "max_tokens": 900, "ignore_eos": True},
        headers={"x-request-id": name},
        stream=True,
        timeout=60,
    ) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith(b"data: "))
        for _ in range(12):
            next(lines)
    row = last_row(contract, name)
    assert row["status"] == 499
    assert 10 <= row["completion_tokens"] < 800
    if not contract.engine.is_remote:
        timed_by = "engine" if contract.engine.times_who_leaves else "estimated"
        assert (row["tokens_source"], row["timing_source"]) == ("engine", timed_by)
        assert row["prompt_tokens"] > 0
    wait_for(lambda: contract.total("rigserve_requests_in_flight") == 0, "nothing is in flight")
