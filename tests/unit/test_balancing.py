"""In which order a route's models are asked."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from serving.config import LlamaCppModel, RemoteModel, RouteConfig
from serving.engines.remote import Remote
from serving.engines.supervisor import Endpoint, Engine, EngineState
from serving.gateway.balancing import Balancer, Marks, Memory, marks_of
from serving.gateway.routing import Backend, Route, Router
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest

NO_MARKS = Marks()


class Here(Engine):
    """An engine of this machine's, in whatever state."""

    def __init__(self, name: str, **options: Any) -> None:
        self.model = LlamaCppModel(name=name, source="m.gguf", **options)
        self.id = name
        self.is_expected = self.model.load == "preload"
        self.state = EngineState.READY

    @property
    def endpoint(self) -> Endpoint | None:
        return Endpoint("http://127.0.0.1:1", "") if self.state is EngineState.READY else None


def away(name: str, **options: Any) -> Remote:
    return Remote(
        RemoteModel(name=name, engine="remote", base_url="http://a.example/v1", **options)
    )


@dataclass
class Load:
    tokens: dict[str, int] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    used: dict[str, float] = field(default_factory=dict)

    def outstanding_tokens(self, backend: Backend) -> int:
        return self.tokens.get(backend.model.name, 0)

    def waiting(self, backend: Backend) -> int:
        return int(backend.model.name in self.queued)

    def last_used(self, backend: Backend) -> float:
        return self.used.get(backend.model.name, 0.0)


class House:
    """A route over engines a and b, and remotes c and d as told."""

    def __init__(self, **route: Any) -> None:
        self.a, self.b = Here("a"), Here("b")
        self.c = away("c")
        self.d = away(
            "d", api_key_env="KEY", budget_usd=1.0, usd_per_million={"input": 1.0, "output": 1.0}
        )
        targets = route.pop("targets", [{"model": "a"}, {"model": "b"}])
        config = RouteConfig.model_validate({"name": "r", "targets": targets, **route})
        router = Router([self.a, self.b], [self.c, self.d], [config])
        found = router.find("r")
        assert isinstance(found, Route)
        self.route = found
        self.load = Load()
        self.balancer = Balancer(self.load, random.Random(1))

    def order(self, marks: Marks = NO_MARKS, *, may_spill: bool = True) -> str:
        ordered = self.balancer.order(self.route, marks, may_spill=may_spill)
        return "".join(each.name for each in ordered)


def chat(*texts: str) -> ChatCompletionRequest:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return ChatCompletionRequest.of({"model": "r", "messages": messages})


def test_the_fewest_tokens_come_first_then_who_has_rested_longest() -> None:
    house = House()
    house.load.tokens = {"a": 100, "b": 10}
    assert house.order() == "ba"
    house.load.tokens = {}
    house.load.used = {"a": 2.0, "b": 1.0}
    assert house.order() == "ba"


def test_fallbacks_come_after_the_targets_and_what_costs_money_comes_last() -> None:
    house = House(targets=[{"model": "a"}], spill_over=["d"], fallback=["c", "b"])
    assert house.order() == "acbd"
    assert house.order(may_spill=False) == "acb"


def test_a_conversation_stays_where_it_is_unless_requests_queue_there_alone() -> None:
    house = House()
    first, second = chat("hi"), chat("hi", "hello", "and?")
    house.balancer.memory.keep(marks_of("r", first), "b")
    house.load.tokens = {"b": 10_000}
    assert house.order(marks_of("r", second)) == "ba"
    # So does another that begins alike, as its beginning is warm.
    assert house.order(marks_of("r", first)) == "ba"
    assert house.order(marks_of("r", chat("ho"))) == "ab"
    house.load.queued = {"b"}
    assert house.order(marks_of("r", second)) == "ab"
    house.load.queued = {"a", "b"}
    assert house.order(marks_of("r", second)) == "ba"


def test_two_conversations_that_begin_alike_are_told_apart_when_they_go_on() -> None:
    memory = Memory()
    memory.keep(marks_of("r", chat("hi", "one", "first")), "a")
    memory.keep(marks_of("r", chat("hi", "two", "second")), "b")
    assert memory.find(marks_of("r", chat("hi", "one", "first", "x", "more")).earlier) == "a"
    assert memory.find(marks_of("r", chat("hi", "two", "second", "x", "more")).earlier) == "b"
    assert marks_of("r", chat("hi")) != marks_of("other", chat("hi"))


def test_texts_are_known_by_their_beginnings() -> None:
    one, other = (
        marks_of("r", CompletionRequest.of({"model": "r", "prompt": "x" * 1024 + end}))
        for end in ("a", "b")
    )
    assert one == other != Marks()


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory = Memory(size=10)
    marks = [marks_of("r", chat(str(number))) for number in range(100)]
    for mark in marks:
        memory.keep(mark, "a")
    assert len(memory) == 10
    assert memory.find(marks[0].whole) is None
    assert memory.find(marks[99].whole) == "a"


def test_weights_are_shares_and_a_conversation_that_goes_on_stays() -> None:
    house = House(targets=[{"model": "a", "weight": 95.0}, {"model": "b", "weight": 5.0}])
    firsts = Counter(house.order(marks_of("r", chat(str(n))))[0] for n in range(4000))
    # Five standard deviations of a binomial distribution.
    assert firsts["b"] == pytest.approx(200, abs=70)
    canary = marks_of("r", chat("hi"))
    house.balancer.memory.keep(canary, "b")
    goes_on = marks_of("r", chat("hi", "hello", "and?"))
    assert {house.order(goes_on) for _ in range(50)} == {"ba"}
    # One that only begins alike is a new one.
    assert {house.order(canary) for _ in range(200)} == {"ab", "ba"}


def test_who_is_down_comes_last_and_an_engine_that_restarts_is_waited_for() -> None:
    house = House(fallback=["c"], spill_over=["d"])
    house.a.state = EngineState.BACKOFF
    assert house.order() == "bcda"
    for _ in range(5):
        passage = house.c.breaker.enter()
        assert passage is not None
        passage.failed()
    assert house.order() == "bdca"
    house.b.state = EngineState.STARTING
    assert house.order() == "dcab"


def test_what_loads_on_demand_is_not_down() -> None:
    house = House()
    house.a.is_expected = False
    house.a.state = EngineState.UNLOADED
    house.load.tokens = {"b": 5}
    assert house.order() == "ab"
