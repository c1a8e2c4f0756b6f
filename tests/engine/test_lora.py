"""LoRA adapters on the real model: their arithmetic, and what clients of an engine with several see."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from numpy.typing import NDArray

from serving.llamacpp.runtime import Context, Model
from serving.llamacpp.runtime.adapters import LoraAdapter, use_adapter
from tests.engine.scheduling import Bench
from tests.lora_files import Lora, random_lora, write_lora, write_model
from tests.processes import ENGINE_KEY, EngineServer

LAYERS = 2
SHAPES = {
    f"blk.{layer}.{name}.weight": shape
    for layer in range(LAYERS)
    for name, shape in {
        "attn_q": (576, 576),
        "attn_k": (192, 576),
        "attn_output": (576, 576),
        "ffn_down": (576, 1536),
    }.items()
}
PROMPT = "The capital of France is Paris, and the capital of Spain is"
# The KV cache is rounded to 16 bits either way.
TOLERANCE = 0.02


@pytest.fixture(scope="module")
def lora() -> Lora:
    return random_lora(SHAPES, seed=1)


def _context(model: Model) -> Context:
    return Context(model, slots=2, context_length=64, batch_tokens=64, threads=1)


def _logprobs(model: Model, context: Context) -> NDArray[np.float32]:
    """Log-probabilities of what follows the prompt, computed afresh."""
    tokens = model.tokenize(PROMPT, add_special=True, parse_special=False)
    context.truncate(0, 0)
    rows = len(tokens)
    context.decode(tokens, range(rows), [0] * rows, [False] * (rows - 1) + [True])
    logits = context.logits(rows - 1).astype(np.float64)
    logits -= logits.max()
    return np.asarray(logits - np.log(np.exp(logits).sum()), np.float32)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_an_adapter_does_what_merging_it_into_the_weights_does(
    tmp_path: Path, small_whole_path: Path, lora: Lora, scale: float
) -> None:
    merged_path = tmp_path / "merged.gguf"
    write_model(merged_path, small_whole_path, layers=LAYERS, lora=lora, scale=scale)
    with closing(Model(merged_path, 0)) as merged, closing(_context(merged)) as context:
        expected = _logprobs(merged, context)
    path = write_lora(tmp_path / "lora.gguf", lora)
    with closing(Model(small_whole_path, 0)) as model, closing(_context(model)) as context:
        base = _logprobs(model, context)
        use_adapter(context.handle, LoraAdapter(model, path, scale))
        adapted = _logprobs(model, context)
    assert np.abs(adapted - base).max() > 50 * TOLERANCE
    assert np.abs(adapted - expected).max() < TOLERANCE


def test_adapters_come_and_go_and_leave_nothing_behind(
    tmp_path: Path, small_whole_path: Path, lora: Lora
) -> None:
    path = write_lora(tmp_path / "lora.gguf", lora)
    other_path = write_lora(tmp_path / "other.gguf", random_lora(SHAPES, seed=2))
    with closing(Model(small_whole_path, 0)) as model, closing(_context(model)) as context:
        base = _logprobs(model, context)
        use_adapter(context.handle, LoraAdapter(model, path, 0.0))
        assert np.array_equal(_logprobs(model, context), base)
        one, other = LoraAdapter(model, path, 1.0), LoraAdapter(model, other_path, 1.0)
        use_adapter(context.handle, one)
        with_one = _logprobs(model, context)
        use_adapter(context.handle, other)
        with_other = _logprobs(model, context)
        assert np.abs(with_one - with_other).max() > 1
        use_adapter(context.handle, None)
        assert np.array_equal(_logprobs(model, context), base)
        one.close()
        # The allocator likes to put the next one where the last one was.
        for seed in range(3):
            again_path = write_lora(tmp_path / f"{seed}.gguf", random_lora(SHAPES, seed=seed))
            again = LoraAdapter(model, again_path, 1.0)
            use_adapter(context.handle, again)
            fresh = _logprobs(model, context)
            assert np.array_equal(fresh, with_other) == (seed == 2)
            assert np.array_equal(fresh, with_one) == (seed == 1)
            use_adapter(context.handle, None)
            again.close()
        use_adapter(context.handle, other)
        assert np.array_equal(_logprobs(model, context), with_other)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of the whole model: a, b and c."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes = {f"blk.{layer}.attn_q.weight": (576, 576) for layer in range(0, 30, 3)}
    for seed, name in enumerate("abc"):
        write_lora(folder / f"{name}.gguf", random_lora(shapes, seed=seed, rank=8))
    return folder


def test_turns_are_fair_between_adapters(model_path: Path, folder: Path) -> None:
    """Who is alone with an adapter is neither held up by the many of another, nor do they wait for it."""
    with Bench(model_path, slots=4) as bench:
        one, other = (LoraAdapter(bench.model, folder / f"{name}.gguf", 1.0) for name in "ab")
        many = [
            bench.submit(f"{PROMPT} {number}", limit=50, adapter=one, tenant="many")
            for number in range(3)
        ]
        alone = bench.submit(PROMPT, limit=20, adapter=other, tenant="alone")
        [end] = bench.ends(1)
        assert end.sequence.job is alone
        # All had a token a turn; a few more were made while this was looked at.
        assert all(15 <= job.sequences[0].generated <= 40 for job in many)
        bench.ends(3)


def test_a_tenant_with_another_adapter_does_not_wait_behind_a_flood(
    model_path: Path, folder: Path
) -> None:
    with Bench(model_path, slots=2) as bench:
        one, other = (LoraAdapter(bench.model, folder / f"{name}.gguf", 1.0) for name in "ab")
        flood = [
            bench.submit(f"{PROMPT} {number}", limit=8, adapter=one, tenant="many")
            for number in range(8)
        ]
        alone = bench.submit(PROMPT, limit=8, adapter=other, tenant="alone")
        bench.ends(9)
        assert bench.order.index(alone.sequences[0]) <= 3
        assert len(bench.order) == 1 + len(flood)


def test_a_name_may_be_loaded_in_place(server: EngineServer, folder: Path) -> None:
    """What is under way goes on with what it began with."""
    load(server, "versioned", folder / "b.gguf")
    old = answer(server, "versioned")
    assert load(server, "versioned", folder / "c.gguf").status_code == 409
    stream = iter(
        server.client.completions.create(
            model="versioned",
            prompt=PROMPT,
            max_tokens=60,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    text = next(stream).choices[0].text
    assert load(server, "versioned", folder / "cut.gguf", load_inplace=True).status_code == 400
    assert same(answer(server, "versioned"), old)
    assert load(server, "versioned", folder / "c.gguf", load_inplace=True).status_code == 200
    assert not same(answer(server, "versioned"), old)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text.startswith(old.choices[0].text)
    assert load(server, "smol", folder / "c.gguf", load_inplace=True).status_code == 409
    unload(server, "versioned")


@pytest.fixture(scope="module")
def server(half_precision_path: Path, folder: Path) -> Iterator[EngineServer]:
    with EngineServer(
        half_precision_path,
        context_length=256,
        max_sequences=4,
        max_queue=16,
        adapter=f"first={folder / 'a.gguf'}",
    ) as server:
        yield server


def post(server: EngineServer, path: str, **body: Any) -> requests.Response:
    return requests.post(
        server.base_url + path,
        json=body,
        headers={"Authorization": f"Bearer {ENGINE_KEY}"},
        timeout=60,
    )


def load(server: EngineServer, name: str, path: Path, **more: Any) -> requests.Response:
    return post(server, "/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)


def unload(server: EngineServer, name: str) -> requests.Response:
    return post(server, "/v1/unload_lora_adapter", lora_name=name)


def answer(server: EngineServer, model: str, prompt: str = PROMPT) -> Any:
    return server.client.completions.create(
        model=model, prompt=prompt, max_tokens=12, temperature=0, logprobs=0
    )


def same(one: Any, other: Any) -> bool:
    """Whether two answers agree, but for what batches of other sizes round differently."""
    left, right = (np.array(a.choices[0].logprobs.token_logprobs) for a in (one, other))
    return one.choices[0].text == other.choices[0].text and bool(
        np.abs(left - right).max() < TOLERANCE
    )


def test_adapters_are_models_of_their_own(server: EngineServer, folder: Path) -> None:
    base, first = answer(server, "smol"), answer(server, "first")
    assert (base.model, first.model) == ("smol", "first")
    assert not same(base, first)
    entry = load(server, "second", folder / "b.gguf").json()
    assert (entry["id"], entry["parent"]) == ("second", "smol")
    assert load(server, "silent", folder / "b.gguf", scale=0).status_code == 200
    names = {model.id for model in server.client.models.list()}
    assert names == {"smol", "first", "second", "silent"}
    second = answer(server, "second")
    assert not same(second, first)
    assert not same(second, base)
    assert same(answer(server, "silent"), base)
    for name in ("second", "silent"):
        assert unload(server, name).json() == {"id": name, "object": "model", "deleted": True}
    with pytest.raises(openai.NotFoundError, match="'second' does not exist; served: smol, first"):
        answer(server, "second")
    assert same(answer(server, "first"), first)


def test_a_name_that_comes_back_has_the_new_adapter(server: EngineServer, folder: Path) -> None:
    prompt = PROMPT * 4  # long enough to be found again in the KV cache
    alone: dict[str, Any] = {}
    for file in "bcb":
        assert load(server, "changing", folder / f"{file}.gguf").status_code == 200
        found = answer(server, "changing", prompt)
        assert found.usage.prompt_tokens_details.cached_tokens == 0
        assert same(found, alone.setdefault(file, found))
        assert answer(server, "changing", prompt).usage.prompt_tokens_details.cached_tokens > 0
        unload(server, "changing")
    assert not same(alone["b"], alone["c"])


def test_adapters_side_by_side_answer_as_they_do_alone(server: EngineServer, folder: Path) -> None:
    names = ["smol", "first", "second", "third"]
    load(server, "second", folder / "b.gguf")
    load(server, "third", folder / "c.gguf")
    prompts = [f"{PROMPT} Madrid. Here are {number} facts:" for number in (3, 5)]
    asked = [(name, prompt) for prompt in prompts for name in names]
    alone = [answer(server, *question) for question in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(lambda question: answer(server, *question), asked))
    for question, one, other in zip(asked, alone, together, strict=True):
        assert other.model == question[0]
        assert same(one, other), question
    unload(server, "second")
    unload(server, "third")


def test_an_adapter_in_use_is_unloaded_when_its_streams_end(
    server: EngineServer, folder: Path
) -> None:
    load(server, "leaving", folder / "b.gguf")

    def stream() -> Any:
        return server.client.completions.create(
            model="leaving",
            prompt=PROMPT,
            max_tokens=60,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    whole = "".join(chunk.choices[0].text for chunk in stream())
    chunks = iter(stream())
    text = next(chunks).choices[0].text
    assert unload(server, "leaving").status_code == 200
    with pytest.raises(openai.NotFoundError):
        answer(server, "leaving")
    assert load(server, "leaving", folder / "c.gguf").status_code == 200
    answer(server, "leaving")
    text += "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole
    unload(server, "leaving")
    assert answer(server, "smol").choices[0].text


def test_what_cannot_be_loaded_is_refused_and_harms_nothing(
    server: EngineServer, folder: Path, model_path: Path, tmp_path: Path
) -> None:
    before = answer(server, "smol")
    whole = (folder / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: len(whole) // 2])
    embedding = np.ones((49152, 4), np.float32), np.ones((576, 4), np.float32)
    bad = {
        "there is no such file": tmp_path / "nowhere.gguf",
        "it ends early": cut,
        "its general.type is 'model'": model_path,
        "shares with its output layer": write_lora(
            tmp_path / "embedding.gguf", Lora({"token_embd.weight": embedding}, alpha=4.0)
        ),
        "made for another model": write_lora(
            tmp_path / "wide.gguf", random_lora({"blk.0.attn_q.weight": (640, 640)}, seed=1)
        ),
    }
    for reason, path in bad.items():
        refusal = load(server, "bad", path)
        error = refusal.json()["error"]
        assert (refusal.status_code, error["param"]) == (400, "lora_path"), reason
        assert reason in error["message"]
    taken = load(server, "first", folder / "b.gguf")
    assert (taken.status_code, taken.json()["error"]["param"]) == (409, "lora_name")
    assert load(server, "smol", folder / "b.gguf").status_code == 409
    assert load(server, "two words", folder / "b.gguf").status_code == 400
    assert post(server, "/v1/load_lora_adapter", lora_name="x").status_code == 400
    assert unload(server, "nobody").status_code == 404
    assert unload(server, "smol").status_code == 404
    assert same(answer(server, "smol"), before)
