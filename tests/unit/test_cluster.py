"""Where replicas go in a cluster, what their keepers are told, and the way to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.cluster.placing import Node, Share, Want, needed, place
from serving.cluster.site import ClusterLauncher, RayCluster
from serving.cluster.task import VARIABLE, Task
from serving.config import Config, ConfigError, MeterConfig, PowerConfig, with_replicas
from serving.engines.launch import Files, Footprint, Launch
from serving.hardware.wall import MeterError
from serving.site import ThisMachine

CPU = [Node("a", 8, 32_000), Node("b", 8, 16_000)]
GPU = [Node("a", 8, 32_000, 1, 24_000), Node("b", 8, 32_000, 2, 12_000), Node("c", 64, 256_000)]
SMALL = Want("m", cpu_mib=9_000, host_mib=1_000, gpu_mib=9_000, cpus=4)


def test_replicas_of_a_model_spread_and_then_go_where_most_is_free() -> None:
    taken: list[Share] = []
    for number in range(4):
        share = place(SMALL, f"m#{number}", CPU, taken)
        if share is None:
            break
        taken.append(share)
    # b has memory for one of them.
    assert [share.node for share in taken] == ["a", "b", "a"]
    assert {(share.cpus, share.memory_mib, share.gpus) for share in taken} == {(4.0, 9_000, 0.0)}
    other = Want("other", cpu_mib=100, cpus=1)
    assert getattr(place(other, "other", CPU, taken[1:2]), "node", None) == "a"


def test_an_engine_without_a_number_of_threads_has_all_cores_of_a_node() -> None:
    want = Want("m", cpu_mib=100)
    first = place(want, "m#1", CPU[:1], [])
    assert first is not None
    assert first.cpus == 8
    assert place(want, "m#2", CPU[:1], [first]) is None


def test_where_there_are_cards_replicas_go_to_cards_by_their_memory() -> None:
    taken: list[Share] = []
    while (share := place(SMALL, "m", GPU, taken)) is not None:
        taken.append(share)
    shares = [(share.node, share.gpus, share.memory_mib) for share in taken]
    # Two on a card of 24 GB, one on each of 12 GB; none on the node without.
    assert Counter(shares) == {("a", 0.375, 1_000): 2, ("b", 0.75, 1_000): 2}
    assert {node for node, _, _ in shares[:2]} == {"a", "b"}


def test_a_large_model_takes_whole_cards() -> None:
    large = Want("m", cpu_mib=1, host_mib=1_000, gpu_mib=20_000)
    [first, second] = [place(large, "m", GPU[:2], []), place(large, "m", GPU[1:], [])]
    assert first is not None
    assert second is not None
    assert (first.node, second.node, second.gpus) == ("a", "b", 2)
    # Parts of a card are counted in ten-thousandths, upwards.
    assert first.gpus == 0.8334
    assert place(Want("m", 1, 1, 30_000), "m", GPU, []) is None
    whole = place(Want("m", 1, 1, 1, cards=2), "m", GPU, [])
    assert whole is not None
    assert (whole.node, whole.gpus) == ("b", 2)


def test_one_that_asks_ray_for_its_cards_is_where_there_are_cards() -> None:
    want = Want("m", cpu_mib=1, host_mib=1_000, gpu_mib=9_000, cards=0)
    share = place(want, "m", [Node("gateway", 64, 256_000), GPU[0]], [])
    assert share is not None
    # It looks for the kind of cards on the machine that it is on.
    assert (share.node, share.gpus, share.on_gpus) == ("a", 0.0, True)


def test_what_is_left_of_two_cards_is_no_third_one() -> None:
    want = Want("m", cpu_mib=1, host_mib=1_000, gpu_mib=14_400)
    node = Node("a", 16, 64_000, gpus=2, gpu_mib=24_000)
    small = Node("b", 16, 64_000, gpus=1, gpu_mib=24_000)
    taken = [share for name in ("m#1", "m#2") if (share := place(want, name, [node], []))]
    assert [share.gpus for share in taken] == [0.6, 0.6]
    # Ray would not give it what it was promised, and it would be born nowhere.
    assert place(want, "m#3", [node], taken) is None
    elsewhere = place(want, "m#3", [node, small], [*taken, replace(taken[0], node="b")])
    assert elsewhere is None
    third = place(want, "m#3", [node, small], taken)
    assert third is not None
    assert third.node == "b"
    # Each of these has a card with another.
    half = Want("n", cpu_mib=1, host_mib=1_000, gpu_mib=9_600)
    halves: list[Share] = []
    for name in ("n#1", "n#2"):
        share = place(half, name, [node], [*taken, *halves])
        assert share is not None
        halves.append(share)
    assert place(half, "n#3", [node], [*taken, *halves]) is None


def test_what_is_missing_is_what_was_looked_for() -> None:
    large = Want("m", cpu_mib=1_000, host_mib=500, gpu_mib=90_000, cpus=4)
    # c would have room for it without cards; it is not asked.
    assert place(large, "m", GPU, []) is None
    assert needed(large, GPU).startswith("90000 MiB of cards' memory and 500 MiB of main memory")
    assert "devices: [cpu]" in needed(large, GPU)
    assert needed(large, CPU) == "1000 MiB of main memory and 4 cores free"
    assert needed(replace(large, may_use_gpus=False), GPU) == needed(large, CPU)
    assert needed(replace(large, cards=4), GPU).startswith("4 cards and")


def test_a_model_for_cpus_leaves_cards_alone() -> None:
    want = Want("m", cpu_mib=100_000, gpu_mib=9_000, cpus=4, may_use_gpus=False)
    share = place(want, "m", GPU, [])
    assert share is not None
    assert (share.node, share.gpus, share.on_gpus) == ("c", 0.0, False)


def test_an_actors_name_says_what_it_takes() -> None:
    share = place(SMALL, "m#1", CPU, [])
    assert share is not None
    assert Share.from_name(share.to_name()) == share
    for foreign in ("SERVE_CONTROLLER", "{}", '{"a": 1}'):
        with pytest.raises((ValueError, TypeError)):
            Share.from_name(foreign)


class Inner:
    """A launcher that knows how much memory its engines take."""

    uses_gpus = True

    def prepare(self, model: Any) -> Files:
        return Files(Path(os.devnull))

    def differ(self, old: Any, new: Any) -> bool:
        return bool(old.context_length != new.context_length)

    def footprint(self, model: Any, files: Files, *, on_gpu: bool) -> Footprint:
        return Footprint(700, 5_000) if on_gpu else Footprint(4_000)

    def launch(self, *_: Any) -> Launch:
        raise AssertionError("that is for the node")


def config(**options: Any) -> Config:
    model = {"name": "m", "source": "hf://a/b", "engine": "vllm", **options}
    return Config.model_validate({"models": [model], "cluster": {"address": "10.0.0.1:6379"}})


def task_of(whole: Config) -> Task:
    model = with_replicas(whole).local_models[-1]
    launch = ClusterLauncher(Inner(), whole).launch(model, Files(Path()), 4711, "key", None)
    assert "key" not in " ".join(launch.command)
    assert launch.environment["RIGSERVE_ENGINE_KEY"] == "key"
    return Task.from_json(launch.environment[VARIABLE])


def test_a_keeper_is_told_the_model_and_what_it_takes() -> None:
    whole = config(engine="llama_cpp", source="hf://a/b/c.gguf", threads=4, replicas=2)
    task = task_of(whole)
    assert (task.name, task.model.name, task.port) == ("m#2", "m", 4711)
    assert task.address == "10.0.0.1:6379"
    assert task.want == Want("m", 4_000, 700, 5_000, cpus=4)
    assert task.config.storage == whole.storage
    assert Task.from_json(task.to_json()) == task


def test_vllm_has_its_cards_for_itself_and_asks_ray_for_those_of_other_nodes() -> None:
    assert task_of(config(tensor_parallel=2)).want.cards == 2
    spread = task_of(config(tensor_parallel=2, pipeline_parallel=2, over_nodes=True))
    assert spread.want.cards == 0
    with pytest.raises(ConfigError, match="rigserve cluster serve"):
        ThisMachine().filled(config(over_nodes=True))


def test_adapters_need_another_engine_in_a_cluster() -> None:
    launcher = ClusterLauncher(Inner(), config())
    [plain] = config().local_models
    [adapted] = config(adapters=[{"name": "x", "path": "x.gguf"}]).local_models
    assert launcher.differ(plain, adapted)
    assert not launcher.differ(plain, plain)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"devices": ("0",)}, "the cluster chooses cards"),
        (
            {"engine": "llama_cpp", "source": "hf://a/b/c.gguf", "context_length": "auto"},
            "auto is for one machine",
        ),
    ],
)
def test_what_only_one_machine_could_answer_is_refused(options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RayCluster().filled(config(**options))
    assert RayCluster().filled(config(devices=("cpu",)))


def test_no_meter_of_one_machine_measures_a_cluster() -> None:
    with contextlib.closing(RayCluster().meter(PowerConfig())) as meter:
        assert meter.draw(0.0, 1.0).source == "estimated"
    wall = MeterConfig.model_validate({"kind": "shelly", "url": "http://plug.example"})
    with pytest.raises(MeterError, match="a cluster has several"):
        RayCluster().meter(PowerConfig(meter=wall))


def run_door(
    test: Callable[[Any, bytes], Awaitable[None]], answer: bytes = b"pong" * 50_000
) -> None:
    """Run ``test`` with a door to an engine that answers and closes."""
    pytest.importorskip("cryptography", reason="pip install 'rigserve[cluster]'")
    from serving.cluster.door import new_secret, open_door

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline():
            writer.write(answer)
        writer.close()

    async def main() -> None:
        async with await asyncio.start_server(engine, "127.0.0.1", 0) as server:
            secret = new_secret()
            port = server.sockets[0].getsockname()[1]
            opened, door = await open_door("127.0.0.1", secret, port)
            async with opened:
                await test(door, secret)

    asyncio.run(main())


async def asked(door: Any, secret: bytes) -> bytes:
    from serving.cluster.door import open_tunnel

    async with await open_tunnel(0, door, secret) as tunnel:
        port = tunnel.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"ping\n")
        try:
            return await reader.read(-1)
        finally:
            writer.close()


def test_a_tunnel_leads_to_the_engine() -> None:
    async def test(door: Any, secret: bytes) -> None:
        assert await asked(door, secret) == b"pong" * 50_000

    run_door(test)


def test_nobody_enters_without_the_secret() -> None:
    async def test(door: Any, secret: bytes) -> None:
        assert await asked(door, bytes(len(secret))) == b""

    run_door(test)


def test_no_other_door_is_taken_for_it() -> None:
    async def test(door: Any, secret: bytes) -> None:
        from serving.cluster.door import open_door

        other, of_other = await open_door("127.0.0.1", secret, 9)
        async with other:
            # Who listens at its address now has another certificate.
            assert await asked(replace(door, certificate=of_other.certificate), secret) == b""

    run_door(test)
