"""Given engines with an embedding model or a reranker, what clients see."""

from __future__ import annotations

import base64
import concurrent.futures
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import openai
import pytest
import requests
from numpy.typing import NDArray

from serving.llamacpp.runtime import Model
from tests import models
from tests.processes import ENGINE_KEY, EngineServer, wait_for

Vector = NDArray[np.float64]

CAT, FELINE, RATES = (
    "A cat sits on the mat.",
    "A feline rests on a rug.",
    "Interest rates rose again.",
)


@pytest.fixture(scope="module")
def embedder(minilm_path: Path) -> Iterator[EngineServer]:
    """An engine with all-MiniLM-L6-v2, batches of 128 tokens, room for two requests."""
    with EngineServer(minilm_path, max_batch_tokens=128, max_sequences=1, max_queue=1) as server:
        yield server


def embed(server: EngineServer, given: Any, **options: Any) -> list[Vector]:
    answer = server.client.embeddings.create(
        model="smol", input=given, encoding_format="float", **options
    )
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    return [np.array(item.embedding) for item in answer.data]


def post(server: EngineServer, path: str, **fields: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
    return requests.post(
        server.base_url + path, json={"model": "smol", **fields}, headers=headers, timeout=60
    )


def tokens_of(server: EngineServer, text: str) -> list[int]:
    tokens: list[int] = post(server, "/tokenize", prompt=text).json()["tokens"]
    return tokens


def unit(vector: Any) -> Vector:
    return np.asarray(vector / np.linalg.norm(vector))


def test_embeddings_equal_a_calculation_in_numpy(embedder: EngineServer) -> None:
    for text in (CAT, RATES, "Ünïcode and 日本, too"):
        states = models.minilm_states(tokens_of(embedder, text))
        (vector,) = embed(embedder, text)
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert vector == pytest.approx(unit(states.mean(0)), abs=5e-4)


def test_texts_that_mean_the_same_are_near(embedder: EngineServer) -> None:
    cat, feline, rates = embed(embedder, [CAT, FELINE, RATES])
    assert cat @ feline > 0.4
    assert abs(cat @ rates) < 0.1


def test_inputs_of_all_lengths_come_back_in_order(embedder: EngineServer) -> None:
    texts = [f"{number} waves, " * (1 + number % 7) for number in range(40)]
    together = embed(embedder, texts)
    assert len(together) == len(texts)
    for text, vector in list(zip(texts, together, strict=True))[::7]:
        assert vector == pytest.approx(embed(embedder, text)[0], abs=3e-4)


def test_base64_is_the_same_and_what_the_sdk_asks_for(embedder: EngineServer) -> None:
    (floats,) = embed(embedder, CAT)
    by_default = embedder.client.embeddings.create(model="smol", input=CAT)
    decoded = np.array(by_default.data[0].embedding, np.float32)
    assert (decoded == floats.astype(np.float32)).all()
    body = post(embedder, "/v1/embeddings", input=CAT, encoding_format="base64").json()
    raw = np.frombuffer(base64.b64decode(body["data"][0]["embedding"]), "<f4")
    assert (raw == floats.astype(np.float32)).all()


def test_dimensions_cut_and_normalise_again(embedder: EngineServer) -> None:
    (whole,), (cut,) = embed(embedder, CAT), embed(embedder, CAT, dimensions=64)
    assert cut == pytest.approx(unit(whole[:64]), abs=1e-6)
    assert len(embed(embedder, CAT, dimensions=models.WIDTH)[0]) == models.WIDTH
    with pytest.raises(openai.BadRequestError, match="384") as refusal:
        embed(embedder, CAT, dimensions=models.WIDTH + 1)
    assert refusal.value.param == "dimensions"


def test_tokens_are_embedded_like_their_text(embedder: EngineServer) -> None:
    tokens = [tokens_of(embedder, text) for text in (CAT, RATES)]
    for by_text, by_tokens in zip(
        embed(embedder, [CAT, RATES]), embed(embedder, tokens), strict=True
    ):
        assert by_tokens == pytest.approx(by_text, abs=1e-6)
    assert embed(embedder, tokens[0])[0] == pytest.approx(embed(embedder, CAT)[0], abs=1e-6)


def test_usage_counts_every_input(embedder: EngineServer) -> None:
    answer = embedder.client.embeddings.create(model="smol", input=[CAT, RATES])
    tokens = sum(len(tokens_of(embedder, text)) for text in (CAT, RATES))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)


def test_inputs_that_cannot_be_embedded_are_named(embedder: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError, match=r"602 tokens.* takes 512") as long:
        embed(embedder, [CAT, "sea " * 600])
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "input[1]")
    with pytest.raises(openai.BadRequestError, match="vocabulary") as unknown:
        embed(embedder, [[101, 102], [101, 30522]])
    assert unknown.value.param == "input[1]"
    assert len(embed(embedder, "sea " * 510)[0]) == models.WIDTH


def test_models_do_only_what_they_are_made_for(
    embedder: EngineServer, engine: EngineServer
) -> None:
    client, hello = embedder.client, [{"role": "user", "content": "Hello"}]
    chat: Any = client.chat.completions.create
    for ask in (
        lambda: chat(model="smol", messages=hello),
        lambda: client.completions.create(model="smol", prompt="Hello"),
    ):
        with pytest.raises(openai.BadRequestError, match="is an embedding model: it does not"):
            ask()
    assert "does not support reranking" in post(embedder, "/v1/rerank").text
    with pytest.raises(openai.BadRequestError, match="does not support embeddings") as refusal:
        embed(engine, "Hello")
    assert refusal.value.code == "unsupported_model"
    assert post(engine, "/v1/rerank", query="a", documents=["b"]).status_code == 400


def test_a_small_request_does_not_wait_for_a_large_one(embedder: EngineServer) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        large = pool.submit(embed, embedder, ["The sea is wide and deep. " * 10] * 150)
        wait_for(lambda: embedder.load()["running"] == 1, "the large request runs")
        embed(embedder, CAT)
        assert not large.done()
        assert len(large.result()) == 150


def requests_of(embedder: EngineServer) -> int:
    load = embedder.load()
    return int(load["waiting"] + load["running"])


def test_a_full_queue_and_a_client_that_leaves(embedder: EngineServer) -> None:
    endless = ["The sea is wide and deep. " * 10] * 2000
    with concurrent.futures.ThreadPoolExecutor() as pool:
        impatient = embedder.client.with_options(timeout=4)
        waits = [
            pool.submit(impatient.embeddings.create, model="smol", input=endless) for _ in range(2)
        ]
        wait_for(lambda: requests_of(embedder) == 2, "two requests are under way")
        with pytest.raises(openai.InternalServerError, match="2 requests wait") as full:
            embed(embedder, CAT)
        assert full.value.status_code == 503
        assert full.value.response.headers["retry-after"] == "1"
        for wait in waits:
            assert isinstance(wait.exception(), openai.APITimeoutError)
    left = time.monotonic()
    wait_for(lambda: requests_of(embedder) == 0, "the requests end")
    assert time.monotonic() - left < 3
    assert len(embed(embedder, CAT)) == 1


def test_a_request_cancelled_by_the_gateway_tells_what_it_used(embedder: EngineServer) -> None:
    headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
    text = "The sea is wide and deep. " * 10
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(
            requests.post,
            f"{embedder.base_url}/v1/embeddings",
            json={"model": "smol", "input": [text] * 1000},
            headers={**headers, "x-request-id": "call-1"},
            timeout=60,
        )
        wait_for(lambda: embedder.load()["running"] == 1, "the request runs")
        requests.post(f"{embedder.base_url}/internal/cancel/call-1", headers=headers, timeout=5)
        body = answer.result(10).json()
    assert len(body["data"]) < 1000
    used = len(body["data"]) * len(tokens_of(embedder, text))
    assert body["usage"]["prompt_tokens"] == used
    assert body["timings"]["prefill_seconds"] >= body["timings"]["prefill_busy_seconds"] >= 0


def test_tokens_there_and_back(engine: EngineServer, embedder: EngineServer) -> None:
    text = "The sea, naïve — 日本\n"
    answer = post(engine, "/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert answer["token_strs"][:2] == ["The", "Ġsea"]
    assert post(engine, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    bare = post(embedder, "/tokenize", prompt="the sea", add_special_tokens=False).json()
    assert post(embedder, "/tokenize", prompt="the sea").json()["tokens"] == [
        101,
        *bare["tokens"],
        102,
    ]
    assert bare["token_strs"] is None
    refusal = post(engine, "/detokenize", tokens=[1, 49152])
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "tokens")
    assert post(engine, "/detokenize", tokens=[]).json() == {"prompt": ""}


def test_a_conversations_tokens_are_those_it_is_answered_from(
    engine: EngineServer, embedder: EngineServer
) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    answer = post(engine, "/tokenize", messages=hello).json()
    chat = engine.client.chat.completions.create(model="smol", messages=hello, max_tokens=1)
    assert chat.usage is not None
    assert answer["count"] == chat.usage.prompt_tokens
    rendered = post(engine, "/detokenize", tokens=answer["tokens"]).json()["prompt"]
    assert "<|im_start|>user\nHello<|im_end|>" in rendered
    assert post(embedder, "/tokenize", messages=hello).json()["error"]["code"] == "no_chat_template"


def test_a_causal_model_pools_its_last_token_also_of_inputs_longer_than_a_batch(
    model_path: Path, tmp_path: Path
) -> None:
    path = models.with_pooling(model_path, tmp_path / "last.gguf", gguf.PoolingType.LAST)
    texts = ["The sea is wide.", "The sea is wide and deep. " * 20]
    with EngineServer(path, max_batch_tokens=32, context_length=512) as server:
        vectors = embed(server, texts)
        for text, vector in zip(texts, vectors, strict=True):
            states = models.hidden_states(path, tokens_of(server, text))
            # Sums in another order, with a KV cache of half precision.
            assert vector @ unit(states[-1]) > 0.999


def test_a_reranker_orders_documents(tmp_path: Path) -> None:
    head = np.random.default_rng(3).normal(0, 0.1, (1, models.WIDTH)).astype(np.float32)
    path = models.write_minilm(tmp_path / "reranker.gguf", head=head)
    documents = [CAT, RATES, "Nets", FELINE]
    with EngineServer(path) as server:
        # BERT's pair: [CLS] query [SEP] document [SEP].
        pairs = [
            tokens_of(server, "Where is the cat?") + tokens_of(server, document)[1:]
            for document in documents
        ]
        logits = [float(models.minilm_states(pair)[0] @ head[0]) for pair in pairs]
        fields: dict[str, Any] = {"query": "Where is the cat?", "documents": documents}
        answer = post(server, "/v1/rerank", **fields).json()
        best = post(server, "/v1/rerank", **fields, top_n=1, return_documents=True).json()
        with pytest.raises(openai.BadRequestError, match="is a reranker: it does not support emb"):
            embed(server, CAT)
        long = post(server, "/v1/rerank", query="a", documents=["b", "sea " * 600]).json()
    order = [result["index"] for result in answer["results"]]
    assert order == sorted(range(4), key=lambda index: -logits[index])
    for result in answer["results"]:
        expected = 1 / (1 + np.exp(-logits[result["index"]]))
        assert result["relevance_score"] == pytest.approx(expected, abs=1e-3)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, pairs))
    assert best["results"] == [{**answer["results"][0], "document": {"text": documents[order[0]]}}]
    assert long["error"]["param"] == "documents[1]"
    assert long["error"]["code"] == "context_length_exceeded"


def test_what_is_no_number_is_an_error(tmp_path: Path) -> None:
    head = np.full((1, models.WIDTH), np.nan, np.float32)
    with EngineServer(models.write_minilm(tmp_path / "broken.gguf", head=head)) as server:
        for _ in range(2):
            answer = post(server, "/v1/rerank", query="a", documents=["b"])
            assert answer.status_code == 500
            assert "no number for input 0" in answer.json()["error"]["message"]


def test_a_causal_reranker_reads_its_template(model_path: Path, tmp_path: Path) -> None:
    head = np.random.default_rng(5).normal(0, 0.3, (2, 64)).astype(np.float32)
    path = models.write_causal_reranker(tmp_path / "reranker.gguf", model_path, head=head)
    query, documents = "sea, {document}", ["wide", "deep " * 30]
    model = Model(path, 0)
    expected = []
    for document in documents:
        text = f"<|im_start|>user\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
        tokens = model.tokenize(text, add_special=False, parse_special=True)
        logits = head @ models.hidden_states(path, tokens)[-1]
        expected.append(float(np.exp(logits[0]) / np.exp(logits).sum()))
    model.close()
    with EngineServer(path, max_batch_tokens=32) as server:
        answer = post(server, "/v1/rerank", query=query, documents=documents).json()
    scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert [scores[0], scores[1]] == pytest.approx(expected, abs=2e-3)
    assert abs(expected[0] - expected[1]) > 0.01


def test_an_encoder_that_does_not_say_how_to_pool_is_refused(
    minilm_path: Path, tmp_path: Path
) -> None:
    data = minilm_path.read_bytes()
    assert data.count(b"bert.pooling_type") == 1
    path = tmp_path / "silent.gguf"
    path.write_bytes(data.replace(b"bert.pooling_type", b"bert.pooling_none"))
    flags = ["--model-path", str(path), "--served-name", "m", "--port", "1"]
    ended = subprocess.run(
        [sys.executable, "-m", "serving.llamacpp", *flags],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "no usable bert.pooling_type" in ended.stderr
