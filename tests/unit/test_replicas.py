"""Replicas of a model: which there are, where requests go, when one more comes or goes, and how they are renewed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from serving.config import Config, ConfigError, ScalingConfig, load_config, with_replicas
from serving.engines.supervisor import Engine, EngineState
from serving.gateway.balancing import Balancer, Marks
from serving.gateway.routing import Route, Router, label_of
from serving.gateway.scaling import Load, Policy, Scaler
from serving.protocol.errors import ApiError
from serving.reload import steps_of
from tests.unit.test_balancing import NO_MARKS, Here
from tests.unit.test_balancing import Load as Traffic

ADAPTER = {"name": "legal", "path": "legal.gguf"}


def config(**options: Any) -> Config:
    model = {"name": "m", "source": "m.gguf", "replicas": 2, "max_replicas": 3, **options}
    return Config.model_validate({"models": [model, {"name": "other", "source": "o.gguf"}]})


def engines(whole: Config) -> list[Engine]:
    """Engines of a config, all of them ready but those that are on demand."""
    made: list[Engine] = []
    for model in whole.local_models:
        engine = Here(model.name.replace("#", "-"))
        engine.model, engine.id = model, model.name
        engine.is_expected = model.load == "preload"
        engine.state = EngineState.READY if engine.is_expected else EngineState.UNLOADED
        made.append(engine)
    return made


def test_each_replica_is_a_model_of_its_own_and_all_are_served_as_one() -> None:
    models = with_replicas(config()).local_models
    assert [(model.name, model.served_name, model.load) for model in models] == [
        ("m#1", "m", "preload"),
        ("m#2", "m", "preload"),
        ("m#3", "m", "on_demand"),
        ("other", "other", "preload"),
    ]
    assert [model.is_replica for model in models] == [True, True, True, False]
    assert with_replicas(config(replicas=1, max_replicas=None)).models[0].name == "m"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("max_replicas: 1", "max_replicas (1) is below replicas (2)"),
        ("load: on_demand", "a model with replicas is loaded with the server"),
        ("port: 9000", "replicas cannot share a port"),
        ("group: big", "replicas are loaded together"),
        ("replicas: 0", "expected at least 1"),
    ],
)
def test_what_replicas_cannot_be(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "rig.yaml"
    several = "" if line.startswith("replicas") else "    replicas: 2\n"
    path.write_text(f"models:\n  - name: m\n    source: hf://a/b/c.gguf\n{several}    {line}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert told in str(caught.value)


def test_clients_see_one_model_with_its_aliases_and_adapters() -> None:
    whole = with_replicas(config(aliases=["alias"], adapters=[ADAPTER]))
    router = Router(engines(whole))
    assert router.names == ["m", "alias", "legal", "other"]
    for name, own_name in (("m", "m"), ("alias", "m"), ("legal", "legal")):
        found = router.find(name)
        assert isinstance(found, Route)
        assert label_of(found) == own_name
        assert [each.name for each in found.candidates] == [own_name] * 3
        assert [each.backend.model.name for each in found.candidates] == ["m#1", "m#2", "m#3"]
    assert router.engine("m#2").model.name == "m#2"
    assert router.engine("other").model.name == "other"
    with pytest.raises(ApiError, match=r"its replicas are m#1, m#2, m#3"):
        router.engine("m")
    with pytest.raises(ApiError, match="does not exist"):
        router.find("m#1")


def test_requests_go_to_wanted_replicas_and_conversations_stay() -> None:
    router, traffic = Router(engines(with_replicas(config()))), Traffic()
    balancer = Balancer(traffic, random.Random(1))
    route = router.find("m")
    assert isinstance(route, Route)

    def order(marks: Marks = NO_MARKS) -> list[str]:
        found = balancer.order(route, marks, may_spill=False)
        return [each.backend.model.name for each in found]

    traffic.tokens = {"m#1": 9, "m#2": 5}
    assert order() == ["m#2", "m#1"]
    balancer.memory.keep(Marks(whole=b"talk"), route.candidates[0].place)
    assert order(Marks(earlier=b"talk")) == ["m#1", "m#2"]
    router.engine("m#3").is_expected = True
    router.engine("m#3").state = EngineState.READY
    assert order()[0] == "m#3"
    router.engine("m#2").state = EngineState.BACKOFF
    assert order() == ["m#3", "m#1", "m#2"]


def test_a_route_gives_replicas_their_models_weight() -> None:
    whole = config()
    targets = [{"model": "m", "weight": 1}, {"model": "other", "weight": 1}]
    routes = Config.model_validate(
        {**whole.model_dump(), "routes": [{"name": "r", "targets": targets}]}
    ).routes
    router = Router(engines(with_replicas(whole)), routes=routes)
    balancer, route = Balancer(Traffic(), random.Random(1)), router.find("r")
    assert isinstance(route, Route)
    firsts = Counter(
        balancer.order(route, NO_MARKS, may_spill=False)[0].backend.model.name for _ in range(4000)
    )
    # Three standard deviations.
    assert firsts["other"] == pytest.approx(2000, abs=95)
    assert firsts["m#1"] == pytest.approx(1000, abs=83)
    assert firsts["m#3"] == 0


SCALING = ScalingConfig(
    waiting_requests=4, outstanding_tokens=1000, up_after_seconds=5.0, down_after_seconds=60.0
)


def load(ready: int, wanted: int, *, waiting: int = 0, tokens: int = 0) -> Load:
    return Load(ready=ready, wanted=wanted, least=1, most=3, waiting=waiting, tokens=tokens)


@pytest.mark.parametrize("much", [{"waiting": 4}, {"tokens": 1000}])
def test_much_to_do_for_long_enough_brings_one_more(much: dict[str, int]) -> None:
    policy = Policy()
    assert policy.change(0.0, load(1, 1, **much), SCALING) == 0
    assert policy.change(4.0, load(1, 1), SCALING) == 0
    assert policy.change(5.0, load(1, 1, **much), SCALING) == 0
    assert policy.change(9.9, load(1, 1, **much), SCALING) == 0
    assert policy.change(10.0, load(1, 1, **much), SCALING) == 1
    # It is on its way.
    assert policy.change(30.0, load(1, 2, **much), SCALING) == 0
    # For two, that is not much.
    assert policy.change(40.0, load(2, 2, **much), SCALING) == 0
    assert policy.change(100.0, load(2, 2, **much), SCALING) == 0


def test_there_are_never_more_than_the_most_nor_fewer_than_the_least() -> None:
    policy = Policy()
    busy, calm = load(3, 3, waiting=100), load(1, 1)
    assert [policy.change(now, busy, SCALING) for now in (0.0, 100.0)] == [0, 0]
    assert [policy.change(now, calm, SCALING) for now in (200.0, 900.0)] == [0, 0]
    assert policy.change(901.0, load(0, 0), SCALING) == 1


def test_one_goes_when_the_others_could_have_done_the_work_for_long() -> None:
    policy = Policy()
    # Half of what would bring one more, for each of those that remain.
    calm, not_calm = load(3, 3, tokens=1000), load(3, 3, tokens=1001)
    assert policy.change(0.0, calm, SCALING) == 0
    assert policy.change(59.0, not_calm, SCALING) == 0
    assert policy.change(60.0, calm, SCALING) == 0
    assert policy.change(119.0, load(3, 3, waiting=1), SCALING) == 0
    assert policy.change(120.0, calm, SCALING) == 0
    assert policy.change(180.0, calm, SCALING) == -1
    assert policy.change(181.0, load(2, 2), SCALING) == 0


class Loader:
    """A fleet that has engines ready at once."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.has_loaded = asyncio.Event()

    async def load(self, engine: Engine) -> None:
        self.loaded.append(engine.model.name)
        engine.state = EngineState.READY
        self.has_loaded.set()


def test_one_that_is_wanted_again_while_it_goes_is_loaded_again() -> None:
    first, second = replicas = engines(with_replicas(config()))[:2]
    fleet = Loader()

    async def look() -> None:
        scaler = Scaler(cast(Any, fleet), cast(Any, Traffic()), lambda: replicas, lambda: SCALING)
        looking = asyncio.create_task(scaler.run())
        # As a reload leaves it that wants two where there was one.
        second.state = EngineState.UNLOADING
        await asyncio.sleep(0)
        assert not fleet.loaded
        second.state = EngineState.UNLOADED
        await asyncio.wait_for(fleet.has_loaded.wait(), 60)
        looking.cancel()

    asyncio.run(look())
    assert fleet.loaded == [second.model.name]
    assert first.state is EngineState.READY


def names(step: Config) -> list[tuple[str, int]]:
    return [(model.name, model.max_sequences) for model in step.models]


def test_replicas_are_renewed_one_by_one() -> None:
    old, new = with_replicas(config()), with_replicas(config(max_sequences=4))
    other = ("other", 16)
    steps = steps_of(old, new, ["m#1", "m#2"], in_place=False)
    assert [names(step) for step in steps] == [
        [("m#1", 4), ("m#2", 16), ("m#3", 4), other],
        [("m#1", 4), ("m#2", 4), ("m#3", 4), other],
    ]
    assert steps[-1] is new
    steps = steps_of(old, new, ["m#1", "m#2"], in_place=True)
    assert [names(step) for step in steps] == [
        [("m#2", 16), ("m#3", 4), other],
        [("m#1", 4), ("m#2", 16), ("m#3", 4), other],
        [("m#1", 4), ("m#3", 4), other],
        [("m#1", 4), ("m#2", 4), ("m#3", 4), other],
    ]
    # The only one that is there stays until there is another.
    assert len(steps_of(old, new, ["m#1"], in_place=True)) == 1
    assert steps_of(old, new, ["other"], in_place=True) == [new]
    assert steps_of(old, new, [], in_place=True) == [new]
