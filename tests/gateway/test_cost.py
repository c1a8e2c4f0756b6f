"""Given a running gateway, every answer tells what it cost: the same as the ledger, and the same on every path."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import pytest
import requests
import yaml

from serving.cost.prices import PriceBook
from serving.gateway.bill import COST_HEADERS, Bill
from tests.models import WIDTH, write_minilm
from tests.processes import RigServer, wait_for, write_config

MODEL, REFERENCE = "smollm2-135m", "openai/gpt-4o-mini"
HELLO: Any = [{"role": "user", "content": "Tell me about the sea."}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": MODEL, "prompt": "The sea", "max_tokens": 4}),
    ("/v1/messages", CHAT),
    ("/v1/responses", {"model": MODEL, "input": "The sea?", "max_output_tokens": 4}),
]
EMBEDDINGS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"model": "minilm", "input": "The sea"}),
    ("/v1/rerank", {"model": "ranker", "query": "sea", "documents": ["The sea", "A cat"]}),
]


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, minilm_path: Path
) -> Iterator[RigServer]:
    """A model that generates, one that embeds, and one that ranks."""
    folder = tmp_path_factory.mktemp("rig")
    path = write_config(folder, cache_dir, max_sequences=2)
    config = yaml.safe_load(path.read_text())
    ranker = write_minilm(folder / "ranker.gguf", head=np.ones((1, WIDTH), np.float32))
    for name, source in (("minilm", minilm_path), ("ranker", ranker)):
        config["models"].append({"name": name, "source": str(source), "threads": 1})
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def ask(rig: RigServer, path: str, body: dict[str, Any], request_id: str) -> requests.Response:
    headers = {"x-request-id": request_id}
    answer = requests.post(rig.base_url + path, json=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer


def row(rig: RigServer, request_id: str) -> Any:
    with closing(sqlite3.connect(rig.ledger_path)) as database:
        database.row_factory = sqlite3.Row
        query = "SELECT * FROM usage WHERE request_id = ?"
        return database.execute(query, (request_id,)).fetchone()


def check(rig: RigServer, request_id: str, told: dict[str, str]) -> None:
    """What was told of a request is what the ledger has."""
    wait_for(lambda: row(rig, request_id), "the request is in the ledger")
    kept = row(rig, request_id)
    usd = kept["energy_usd"] + kept["idle_usd"] + kept["hardware_usd"]
    assert usd > 0
    assert float(told["x-rigserve-cost-usd"]) == pytest.approx(usd, abs=1e-12)
    energy_usd = float(told["x-rigserve-cost-energy-usd"])
    assert energy_usd == pytest.approx(kept["energy_usd"], abs=1e-12)
    sources = {kept["tokens_source"], kept["timing_source"], kept["energy_source"]}
    basis = "estimated" if "estimated" in sources else "measured"
    assert told["x-rigserve-cost-basis"] == basis
    assert told["x-rigserve-compare-model"] == REFERENCE
    tokens = (kept["prompt_tokens"], kept["cached_tokens"], kept["completion_tokens"])
    there_usd = PriceBook([REFERENCE]).usd(REFERENCE, *tokens)
    assert float(told["x-rigserve-compare-usd"]) == pytest.approx(there_usd, abs=1e-12)
    assert there_usd > 0


@pytest.mark.parametrize(("path", "body"), [*REQUESTS, *EMBEDDINGS])
def test_headers_tell_what_the_ledger_has(rig: RigServer, path: str, body: dict[str, Any]) -> None:
    name = f"whole{path.replace('/', '-')}"
    answer = ask(rig, path, body, name)
    check(rig, name, dict(answer.headers))
    assert "usd" not in str(answer.json()["usage"])


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_a_comment_before_the_end_of_a_stream_tells_it(
    rig: RigServer, path: str, body: dict[str, Any]
) -> None:
    name = f"stream{path.replace('/', '-')}"
    answer = ask(rig, path, {**body, "stream": True}, name)
    assert not set(COST_HEADERS) & {header.lower() for header in answer.headers}
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    [comment] = [block for block in blocks if block.startswith(":")]
    assert comment != blocks[-1]
    told = dict(line.removeprefix(": ").split(": ") for line in comment.splitlines())
    assert list(told) == list(COST_HEADERS)
    check(rig, name, told)


def test_sdks_read_streams_with_comments(rig: RigServer) -> None:
    chunks = list(rig.client.chat.completions.create(**CHAT, stream=True))
    assert chunks[-1].choices[0].finish_reason == "length"
    with anthropic.Anthropic(base_url=rig.base_url, api_key="unused").messages.stream(
        **CHAT
    ) as stream:
        assert stream.get_final_message().usage.output_tokens == 4
    with rig.client.responses.stream(model=MODEL, input="Hi", max_output_tokens=4) as events:
        assert [event.type for event in events][-1] == "response.incomplete"


def test_what_was_refused_cost_nothing(rig: RigServer) -> None:
    long = CHAT | {"messages": [{"role": "user", "content": "sea " * 2000}]}
    answer = requests.post(f"{rig.base_url}/v1/chat/completions", json=long, timeout=30)
    assert answer.status_code == 400
    assert float(answer.headers["x-rigserve-cost-usd"]) == 0


def test_nothing_to_compare_with_is_not_told() -> None:
    bill = Bill(usd=2.5e-7, energy_usd=1e-7, estimated=False, elsewhere=None)
    assert bill.headers == {
        "x-rigserve-cost-usd": "0.000000250000",
        "x-rigserve-cost-energy-usd": "0.000000100000",
        "x-rigserve-cost-basis": "measured",
    }
    assert bill.comment.endswith(b": x-rigserve-cost-basis: measured\n\n")
