"""Tenants, priorities and drafts, as clients of a real engine with two slots see them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.protocol.tenancy import Tenancy
from tests.processes import EngineServer, wait_for

BATCH = Tenancy(priority="batch")


@pytest.fixture(scope="module")
def engine(model_path: Path) -> Iterator[EngineServer]:
    with EngineServer(
        model_path,
        context_length=512,
        max_sequences=2,
        max_queue=64,
    ) as server:
        yield server


class Client:
    """A request on a thread of its own."""

    def __init__(self, engine: EngineServer, tenancy: Tenancy, **options: Any) -> None:
        fields: dict[str, Any] = {
            "model": "smol",
            "messages": [{"role": "user", "content": "Tell me about the sea."}],
            "max_tokens": 20,
            "temperature": 0,
            "extra_headers": tenancy.to_headers(),
            "extra_body": {"ignore_eos": True},
        }
        self._fields = fields | options
        self._engine = engine
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.answer: Any = self._engine.client.chat.completions.create(**self._fields)
        self.ended_at = time.monotonic()

    def join(self) -> Any:
        self._thread.join(60)
        return self.answer


def test_the_answer_names_the_tier_that_served_it(engine: EngineServer) -> None:
    def tier(tenancy: Tenancy, **options: Any) -> Any:
        return Client(engine, tenancy, max_tokens=1, **options).join().service_tier

    assert tier(Tenancy(), service_tier="auto") == "default"
    assert tier(BATCH, service_tier="flex") == "flex"
    # Headers decide: what a body says is the gateway's business.
    assert tier(Tenancy(), service_tier="flex") == "default"
    assert tier(BATCH) is None


def test_each_chunk_of_a_stream_names_the_tier(engine: EngineServer) -> None:
    stream = Client(engine, BATCH, max_tokens=4, service_tier="flex", stream=True).join()
    assert {chunk.service_tier for chunk in stream} == {"flex"}


def test_batch_gives_way_and_loses_nothing(engine: EngineServer) -> None:
    alone = Client(engine, BATCH, max_tokens=80).join()
    before = engine.load()["preemptions"]
    batch = [Client(engine, BATCH, max_tokens=80) for _ in range(2)]
    wait_for(lambda: engine.load()["running"] == 2, "batch requests run")
    urgent = [Client(engine, Tenancy(), max_tokens=20) for _ in range(2)]
    for client in urgent:
        client.join()
    for client in batch:
        answer = client.join()
        assert answer.usage.completion_tokens == 80
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].message.content[:100] == alone.choices[0].message.content[:100]
    assert max(client.ended_at for client in urgent) < min(client.ended_at for client in batch)
    assert engine.load()["preemptions"] > before


def test_one_request_does_not_wait_behind_twenty(engine: EngineServer) -> None:
    many = [Client(engine, Tenancy("many")) for _ in range(20)]
    wait_for(lambda: engine.load()["waiting"] >= 14, "most of them wait")
    one = Client(engine, Tenancy("one"))
    one.join()
    for client in many:
        client.join()
    ended_later = sum(client.ended_at > one.ended_at for client in many)
    # Those in slots are ahead, and those that were served before it came.
    assert ended_later >= 10


def test_drafts_are_made_where_text_repeats_and_lose_no_token(model_path: Path) -> None:
    count = ", ".join(["one", "two", "three", "four", "five"] * 8)
    with EngineServer(
        model_path, context_length=512, max_sequences=1, speculation="prompt_lookup"
    ) as fresh:
        answer = Client(
            fresh,
            Tenancy(),
            messages=[{"role": "user", "content": f"Go on counting like this: {count}"}],
            max_tokens=60,
        ).join()
        load = fresh.load()
    assert load["drafted_tokens"] >= load["accepted_tokens"] > 0
    # The first token comes from the prompt's step.
    assert sum(load["decode_steps"].values()) + load["accepted_tokens"] == 59
    assert answer.usage.completion_tokens == 60
