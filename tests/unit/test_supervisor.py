"""Engines that misbehave, and cards that are not there: small programs in place of engines, and of NVIDIA's library."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import psutil
import pynvml
import pytest

from serving.config import LlamaCppModel, MemoryConfig, ModelConfig
from serving.engines.launch import Files, Footprint, Launch
from serving.engines.standstill import Pulse
from serving.engines.supervisor import (
    Engine,
    EngineStartError,
    EngineState,
    NoRoomError,
    Supervisor,
)
from serving.hardware.memory import MIB, gpu_mib_of, gpus

# It is ready at once, unless its name says what is wrong with it.
_PROGRAM = """
import http.server, os, signal, sys, time
name, port = sys.argv[1], int(sys.argv[2])
if "broken" in name: sys.exit("no such weights")
if "slow" in name: time.sleep(60)
if "stubborn" in name: signal.signal(signal.SIGTERM, signal.SIG_IGN)
asked = 0
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global asked
        asked += 1
        if "hangs" in name and asked > 1: time.sleep(60)
        self.send_response(500 if "fails" in name and asked > 1 else 200); self.end_headers()
    def do_POST(self): time.sleep(60)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
"""


@dataclass
class Programs:
    """Launches the program above. ``needs_mib`` is each model's footprint, in main memory or on cards."""

    uses_gpus: bool = False
    needs_mib: int = 100
    launched: dict[str, Launch] = field(default_factory=dict)
    pulse: Pulse | None = None

    def prepare(self, model: ModelConfig) -> Files:
        return Files(Path(os.devnull))

    def differ(self, old: ModelConfig, new: ModelConfig) -> bool:
        return True

    def footprint(self, model: ModelConfig, files: Files, *, on_gpu: bool) -> Footprint:
        needs_mib = model.memory_mib or self.needs_mib
        if on_gpu:
            return Footprint(0, needs_mib, source="configured")
        return Footprint(needs_mib, source="configured")

    def launch(
        self,
        model: ModelConfig,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        environment = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        command = [sys.executable, "-I", "-c", _PROGRAM, model.name, str(port)]
        self.launched[model.name] = Launch(command, environment, pulse=self.pulse)
        return self.launched[model.name]


def run(
    test: Callable[[Supervisor], Awaitable[None]],
    *names: str,
    budget_mib: int = 250,
    launcher: Programs | None = None,
    **options: Any,
) -> None:
    """Run ``test`` with a supervisor of models that are loaded on demand; afterwards nothing is left of it."""
    before = set(psutil.Process().children())

    async def main() -> None:
        models = [
            LlamaCppModel(name=name, source="-", **{"load": "on_demand", **options})
            for name in names
        ]
        async with aiohttp.ClientSession() as session:
            launchers = {"llama_cpp": launcher or Programs()}
            memory = MemoryConfig(budget_mib=budget_mib, gpu_reserve_mib=500)
            supervisor = Supervisor(models, launchers, session, memory)
            running = asyncio.create_task(supervisor.run())
            await asyncio.sleep(0)
            try:
                await test(supervisor)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            assert {engine.state for engine in supervisor.engines} == {EngineState.STOPPED}

    asyncio.run(main())
    assert set(psutil.Process().children()) <= before


def processes() -> list[str]:
    """The names of the models whose programs run."""
    names = []
    for guard in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            lines = [program.cmdline() for program in guard.children()]
            names += [line[4] for line in lines if line[2:3] == ["-c"]]
    return names


def test_what_goes_wrong_at_the_start_is_told_to_all_who_wait() -> None:
    async def test(supervisor: Supervisor) -> None:
        [broken] = supervisor.engines
        results = await asyncio.gather(
            supervisor.load(broken), supervisor.load(broken), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, EngineStartError)
            assert "no such weights" in str(result)
        assert broken.state is EngineState.UNLOADED
        assert broken.failure
        assert not broken.shares_mib

    run(test, "broken")


def test_one_that_is_not_ready_in_time_is_ended() -> None:
    async def test(supervisor: Supervisor) -> None:
        [slow] = supervisor.engines
        with pytest.raises(EngineStartError, match=r"not ready after 0\.3 s"):
            await supervisor.load(slow)
        assert slow.pid is None

    run(test, "slow", start_timeout_seconds=0.3)


def test_an_engine_that_is_unloaded_while_it_loads() -> None:
    async def test(supervisor: Supervisor) -> None:
        [slow] = supervisor.engines
        starting = asyncio.Event()
        supervisor.subscribe(lambda e: starting.set() if e.state is EngineState.STARTING else None)
        loading = asyncio.create_task(supervisor.load(slow))
        await starting.wait()
        await supervisor.unload(slow)
        assert slow.pid is None
        with pytest.raises(EngineStartError, match="unloaded"):
            await loading

    run(test, "slow")


def test_one_that_ignores_sigterm_is_gone_when_its_unload_returns() -> None:
    async def test(supervisor: Supervisor) -> None:
        [stubborn] = supervisor.engines
        await supervisor.load(stubborn)
        assert stubborn.pid is not None
        family = psutil.Process(stubborn.pid).children(recursive=True)
        assert family
        await supervisor.unload(stubborn)
        assert not [each for each in family if each.is_running()]

    run(test, "stubborn")


@pytest.mark.parametrize("name", ["hangs", "fails"])
def test_one_that_answers_no_more_is_started_again(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(supervisor: Supervisor) -> None:
        [engine] = supervisor.engines
        away = asyncio.Event()
        supervisor.subscribe(lambda e: away.set() if e.state is EngineState.BACKOFF else None)
        await supervisor.load(engine)
        first = engine.pid
        async with asyncio.timeout(20):
            await away.wait()
            await engine.ready()
        assert engine.pid != first
        assert engine.restarts == 1
        assert "did not answer for 0.5 s" in caplog.text

    run(test, name, step_timeout_seconds=0.5)


def test_one_that_answers_and_computes_nothing_is_started_again_if_it_has_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(supervisor: Supervisor) -> None:
        [engine] = supervisor.engines
        away, requests = asyncio.Event(), 0
        supervisor.subscribe(lambda e: away.set() if e.state is EngineState.BACKOFF else None)
        supervisor.traffic(lambda _: 0.0, lambda _: requests)
        await supervisor.load(engine)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await away.wait()
        requests = 1
        async with asyncio.timeout(60):
            await away.wait()
            requests = 0
            await engine.ready()
        assert "has requests, and computed nothing for" in caplog.text

    pulse = Pulse("/", lambda _: b"no step", ("/", {}))
    run(test, "still", launcher=Programs(pulse=pulse), step_timeout_seconds=0.3)


def test_nobody_leaves_who_may_not() -> None:
    async def test(supervisor: Supervisor) -> None:
        first, second, third = supervisor.engines
        await asyncio.gather(supervisor.load(first), supervisor.load(second))
        with pytest.raises(NoRoomError, match="first, second") as refused:
            await supervisor.load(third)
        assert not refused.value.is_final
        await supervisor.load(third, lambda engine: engine is second)
        assert [engine.state.value for engine in supervisor.engines] == [
            *("ready", "unloaded", "ready"),
        ]
        assert third.endpoint is not None

    run(test, "first", "second", "third")


def test_models_of_a_group_are_never_loaded_together() -> None:
    async def test(supervisor: Supervisor) -> None:
        first, second = supervisor.engines
        await supervisor.load(first)
        with pytest.raises(NoRoomError, match="first of its group 'g'"):
            await supervisor.load(second)
        await supervisor.load(second, lambda _: True)
        assert first.state is EngineState.UNLOADED

    run(test, "first", "second", group="g")


def test_preloaded_models_that_do_not_fit_together_end_the_start() -> None:
    before = set(psutil.Process().children())

    async def main() -> None:
        models = [LlamaCppModel(name=name, source="-") for name in ("first", "second")]
        async with aiohttp.ClientSession() as session:
            memory = MemoryConfig(budget_mib=150)
            supervisor = Supervisor(models, {"llama_cpp": Programs()}, session, memory)
            with pytest.raises(ExceptionGroup) as ended:
                await supervisor.run()
        assert ended.group_contains(NoRoomError, match="no room for it")

    asyncio.run(main())
    assert set(psutil.Process().children()) <= before


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_together_the_budget_holds_and_nothing_is_loaded_twice(seed: int) -> None:
    chance = random.Random(seed)

    async def test(supervisor: Supervisor) -> None:
        most_mib = 0

        def look(_: Engine) -> None:
            nonlocal most_mib
            with_memory = [e for e in supervisor.engines if e.state is not EngineState.PREPARING]
            most_mib = max(most_mib, sum(sum(e.shares_mib.values()) for e in with_memory))

        supervisor.subscribe(look)

        async def watch() -> None:
            while True:
                running = processes()
                assert len(running) == len(set(running))
                await asyncio.sleep(0.02)

        async def client() -> None:
            for _ in range(10):
                engine = chance.choice(supervisor.engines)
                await asyncio.sleep(chance.uniform(0, 0.1))
                try:
                    if chance.random() < 0.3:
                        await supervisor.unload(engine)
                    else:
                        async with asyncio.timeout(chance.uniform(0.05, 3)):
                            await supervisor.load(engine, lambda _: True)
                except (EngineStartError, TimeoutError):
                    pass

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(5)))
        assert not watching.done()
        watching.cancel()
        for engine in supervisor.engines:
            await supervisor.unload(engine)
        assert 200 <= most_mib <= 250
        assert not any(engine.shares_mib for engine in supervisor.engines)

    run(test, "first", "second", "third", "fourth")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """NVIDIA's library as on a rig with two cards, of 8 and 24 GiB; gives what is free, in MiB."""
    free_mib = {"GPU-small": 8000, "GPU-big": 24000}
    uuids = list(free_mib)
    process = SimpleNamespace(pid=42, usedGpuMemory=700 * MIB)

    def memory(uuid: str) -> SimpleNamespace:
        return SimpleNamespace(total=24000 * MIB, free=free_mib[uuid] * MIB)

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: len(uuids),
        "nvmlDeviceGetHandleByIndex": lambda index: uuids[index],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetUUID": lambda uuid: uuid,
        "nvmlDeviceGetName": lambda uuid: f"Card {uuid}",
        "nvmlDeviceGetComputeRunningProcesses": lambda uuid: [process] * (uuid == "GPU-big"),
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    return free_mib


def test_what_the_cards_hold(two_cards: dict[str, int]) -> None:
    assert [(gpu.index, gpu.uuid, gpu.free_mib) for gpu in gpus()] == [
        (0, "GPU-small", 8000),
        (1, "GPU-big", 24000),
    ]
    assert gpu_mib_of({42}) == {"GPU-small": 0, "GPU-big": 700}
    assert gpu_mib_of({43}) == {"GPU-small": 0, "GPU-big": 0}


def test_engines_see_the_cards_they_were_given_and_no_others(two_cards: dict[str, int]) -> None:
    launcher = Programs(uses_gpus=True)

    async def test(supervisor: Supervisor) -> None:
        seen = {}
        for engine in supervisor.engines:
            await supervisor.load(engine, lambda _: True)
            launch = launcher.launched[engine.model.name]
            seen[engine.model.name] = launch.environment["CUDA_VISIBLE_DEVICES"]
            two_cards[seen[engine.model.name]] -= launcher.needs_mib
        assert seen == {"a": "GPU-small", "b": "GPU-big"}
        [a, b] = supervisor.engines
        assert dict(b.shares_mib) == {"GPU-big": 6000}
        assert a.state is EngineState.READY

    launcher.needs_mib = 6000
    run(test, "a", "b", launcher=launcher)


@pytest.mark.parametrize(
    ("devices", "visible"), [(("1",), "GPU-big"), (("GPU-small",), "GPU-small"), (("cpu",), "")]
)
def test_the_operator_may_choose_the_devices(
    two_cards: dict[str, int], devices: tuple[str, ...], visible: str
) -> None:
    launcher = Programs(uses_gpus=True)

    async def test(supervisor: Supervisor) -> None:
        await supervisor.load(supervisor.engines[0])
        assert launcher.launched["a"].environment == {"CUDA_VISIBLE_DEVICES": visible}

    run(test, "a", launcher=launcher, devices=devices)


def test_a_card_that_is_not_there_is_refused_by_name(two_cards: dict[str, int]) -> None:
    async def test(supervisor: Supervisor) -> None:
        with pytest.raises(NoRoomError, match=r"names 7; the GPUs here: 0 \(GPU-small"):
            await supervisor.load(supervisor.engines[0])

    run(test, "a", launcher=Programs(uses_gpus=True), devices=("7",))
