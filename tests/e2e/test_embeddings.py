"""Given `rigserve serve` with an embedding model, what SDK users and the operator see."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from tests.processes import RigServer, wait_for, write_config

TEXTS = ["A cat sits on the mat.", "A feline rests on a rug."]


@pytest.fixture(scope="module")
def embedding_rig(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, minilm_path: Path
) -> Iterator[RigServer]:
    """`rigserve serve` with all-MiniLM-L6-v2; ready."""
    model = {"name": "minilm", "aliases": ["text-embedding-3-small"], "source": str(minilm_path)}
    folder = tmp_path_factory.mktemp("embedding-rig")
    with RigServer(write_config(folder, cache_dir, quantization=None, **model)) as server:
        server.wait_until_ready()
        yield server


def post(rig: RigServer, path: str, **fields: Any) -> requests.Response:
    return requests.post(rig.base_url + path, json={"model": "minilm", **fields}, timeout=30)


def test_the_sdk_embeds_and_every_token_is_in_the_ledger(embedding_rig: RigServer) -> None:
    def computed() -> float:
        series = embedding_rig.series("rigserve_engine_step_rows_sum")
        return series['{model="minilm",phase="prefill"}']

    before = computed()
    answer = embedding_rig.client.embeddings.create(
        model="text-embedding-3-small", input=TEXTS, dimensions=128, user="ann"
    )
    assert answer.model == "minilm"
    assert [len(item.embedding) for item in answer.data] == [128, 128]
    tokens = sum(post(embedding_rig, "/tokenize", prompt=text).json()["count"] for text in TEXTS)
    assert answer.usage.prompt_tokens == tokens
    assert computed() - before == tokens

    def row() -> Any:
        with sqlite3.connect(embedding_rig.ledger_path) as connection:
            return connection.execute(
                "SELECT model, endpoint, status, prompt_tokens, completion_tokens, tokens_source,"
                " timing_source, prefill_busy_seconds > 0 FROM usage WHERE user = 'ann'"
            ).fetchall()

    wait_for(row, "the row")
    assert row() == [("minilm", "/v1/embeddings", 200, tokens, 0, "engine", "engine", 1)]


def test_what_uses_no_tokens_is_counted_but_not_in_the_ledger(embedding_rig: RigServer) -> None:
    def counted(path: str, status: int) -> float:
        labels = f'{{endpoint="{path}",model="minilm",status="{status}"}}'
        return embedding_rig.series("rigserve_requests_total").get(labels, 0)

    def rows() -> int:
        with sqlite3.connect(embedding_rig.ledger_path) as connection:
            count: int = connection.execute("SELECT count(*) FROM usage").fetchone()[0]
            return count

    before = {path: counted(path, 200) for path in ("/tokenize", "/detokenize")}
    tokens = post(embedding_rig, "/tokenize", prompt="the sea").json()["tokens"]
    text = post(embedding_rig, "/detokenize", tokens=tokens).json()["prompt"]
    assert "the sea" in text
    assert post(embedding_rig, "/detokenize", tokens=[10**6]).status_code == 400
    assert {path: counted(path, 200) for path in before} == {p: n + 1 for p, n in before.items()}
    assert counted("/detokenize", 400) == 1
    embedding_rig.client.embeddings.create(model="minilm", input="the sea", user="bob")
    wait_for(lambda: rows() > 0, "the row of the embedding")
    with sqlite3.connect(embedding_rig.ledger_path) as connection:
        endpoints = connection.execute("SELECT DISTINCT endpoint FROM usage").fetchall()
    assert endpoints == [("/v1/embeddings",)]


def test_a_client_that_leaves_pays_for_what_was_computed(embedding_rig: RigServer) -> None:
    text = "The sea is wide and deep. " * 10
    tokens = post(embedding_rig, "/tokenize", prompt=text).json()["count"]
    impatient = embedding_rig.client.with_options(timeout=1.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.embeddings.create(model="minilm", input=[text] * 2000, user="eve")

    def row() -> Any:
        with sqlite3.connect(embedding_rig.ledger_path) as connection:
            return connection.execute(
                "SELECT status, tokens_source, prompt_tokens FROM usage WHERE user = 'eve'"
            ).fetchone()

    wait_for(row, "the row")
    status, source, used = row()
    assert (status, source) == (499, "engine")
    assert 0 < used < 2000 * tokens
    assert used % tokens == 0


def test_errors_are_the_sdks_exceptions(embedding_rig: RigServer) -> None:
    create: Any = embedding_rig.client.embeddings.create
    with pytest.raises(openai.BadRequestError, match="input 1 is empty"):
        create(model="minilm", input=["a", ""])
    with pytest.raises(openai.BadRequestError) as long:
        create(model="minilm", input=["a", "sea " * 600])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input[1]")
    with pytest.raises(openai.NotFoundError):
        create(model="minilm-2", input="a")
    with pytest.raises(openai.BadRequestError, match="does not support chat completions"):
        embedding_rig.client.chat.completions.create(
            model="minilm", messages=[{"role": "user", "content": "Hello"}]
        )
    with pytest.raises(openai.BadRequestError, match="does not support chat completions"):
        embedding_rig.client.chat.completions.create(
            model="minilm", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
    assert post(embedding_rig, "/v1/rerank", query="a", documents=["b"]).status_code == 400
