"""Engines that make room by falling asleep: small programs with vLLM's calls for that in place of a vLLM on a card.

None of the machines that run these tests has a card. What the programs hold of one, a library in place of NVIDIA's reads
from their files.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import psutil
import pynvml
import pytest

from serving.config import LlamaCppModel, MemoryConfig, ModelConfig
from serving.engines.launch import Files, Footprint, Launch
from serving.engines.supervisor import (
    Engine,
    EngineStartError,
    EngineState,
    NoRoomError,
    Supervisor,
)
from serving.gateway.admission import Admission
from serving.gateway.swapping import Swapper
from serving.hardware.memory import MIB
from serving.metrics import Metrics
from serving.protocol.tenancy import Tenancy

CARD = "GPU-one"
CARD_MIB, RESERVE_MIB, AWAKE_MIB, ASLEEP_HOST_MIB = 8000, 500, 6000, 3000

# It notes how much it holds of the card, and what it was told.
_PROGRAM = """
import http.server, os, pathlib, sys
name, port, folder, key = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), os.environ["KEY"]
def hold(mib): (folder / str(os.getpid())).write_text(str(mib))
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status):
        if self.headers["authorization"] != f"Bearer {key}": status = 401
        self.send_response(status); self.send_header("content-length", "0"); self.end_headers()
    def do_GET(self): self.answer(200)
    def do_POST(self):
        with (folder / f"{name}.told").open("a") as told: told.write(self.path + "\\n")
        if self.path == "/sleep?level=1":
            if "sleepless" in name: return self.answer(500)
            hold(2000 if "clinging" in name else 700)
        elif self.path == "/wake_up":
            if "dead" in name: os._exit(1)
            hold(6000)
        self.answer(200)
    def log_message(self, *_): pass
hold(6000)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@dataclass
class Sleepers:
    """Launches the program above."""

    folder: Path
    uses_gpus: bool = True

    def prepare(self, model: ModelConfig) -> Files:
        return Files(Path(os.devnull))

    def differ(self, old: ModelConfig, new: ModelConfig) -> bool:
        return True

    def footprint(self, model: ModelConfig, files: Files, *, on_gpu: bool) -> Footprint:
        asleep_mib = 0 if "plain" in model.name else ASLEEP_HOST_MIB
        return Footprint(100, AWAKE_MIB, asleep_mib=asleep_mib, source="configured")

    def launch(
        self,
        model: ModelConfig,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        assert gpus == (CARD,)
        words = [model.name, str(port), str(self.folder)]
        return Launch([sys.executable, "-I", "-c", _PROGRAM, *words], {"KEY": api_key})

    def told(self, name: str) -> list[str]:
        """The calls that a model's programs were sent."""
        file = self.folder / f"{name}.told"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sleepers:
    """With one card of 8 GiB, of which the programs hold what they say."""

    def processes(_: str) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(pid=int(file.name), usedGpuMemory=int(file.read_text() or 0) * MIB)
            for file in tmp_path.iterdir()
            if file.name.isdecimal() and psutil.pid_exists(int(file.name))
        ]

    def memory(uuid: str) -> SimpleNamespace:
        used = sum(each.usedGpuMemory for each in processes(uuid))
        return SimpleNamespace(total=CARD_MIB * MIB, free=CARD_MIB * MIB - used)

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda _: CARD,
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetUUID": lambda uuid: uuid,
        "nvmlDeviceGetName": lambda _: "Card",
        "nvmlDeviceGetComputeRunningProcesses": processes,
    }.items():
        monkeypatch.setattr(pynvml, name, answer)
    return Sleepers(tmp_path)


def run(
    launcher: Sleepers,
    test: Callable[[Supervisor, list[Engine]], Awaitable[None]],
    *names: str,
    budget_mib: int = 10_000,
    **options: Any,
) -> None:
    """Run ``test`` with a supervisor of models that are loaded on demand."""

    async def main() -> None:
        models = [
            LlamaCppModel(name=name, source="-", load="on_demand", **options) for name in names
        ]
        async with aiohttp.ClientSession() as session:
            memory = MemoryConfig(budget_mib=budget_mib, gpu_reserve_mib=RESERVE_MIB)
            supervisor = Supervisor(models, {"llama_cpp": launcher}, session, memory)
            running = asyncio.create_task(supervisor.run())
            await asyncio.sleep(0)
            try:
                await test(supervisor, list(supervisor.engines))
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            assert {engine.state for engine in supervisor.engines} == {EngineState.STOPPED}

    asyncio.run(main())


async def load(supervisor: Supervisor, engine: Engine) -> None:
    await supervisor.load(engine, lambda _: True)
    assert engine.endpoint is not None


def test_two_take_turns_without_a_new_process(launcher: Sleepers) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        [a, b] = engines
        await load(supervisor, a)
        pid = a.pid
        await load(supervisor, b)
        assert a.state is EngineState.ASLEEP
        assert a.endpoint is None
        assert dict(a.shares_mib) == {"cpu": ASLEEP_HOST_MIB, CARD: 700}
        assert launcher.told("a") == ["/sleep?level=1"]
        for engine, other in ((a, b), (b, a), (a, b)):
            await load(supervisor, engine)
            assert other.state is EngineState.ASLEEP
            assert dict(engine.shares_mib) == {"cpu": 100, CARD: AWAKE_MIB}
        assert a.pid == pid
        assert launcher.told("a") == ["/sleep?level=1", "/wake_up"] * 2
        assert a.restarts == b.restarts == 0

        # While the other may not leave, it sleeps on, and holds what it held.
        with pytest.raises(NoRoomError):
            await supervisor.load(b)
        assert b.shares_mib["cpu"] == ASLEEP_HOST_MIB
        assert b.pid is not None
        await supervisor.unload(b)
        assert b.state is EngineState.UNLOADED
        assert not b.shares_mib

    run(launcher, test, "a", "b")


def test_of_a_group_one_may_sleep_beside_the_other(launcher: Sleepers) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        [a, b] = engines
        await load(supervisor, a)
        await load(supervisor, b)
        assert a.state is EngineState.ASLEEP

    run(launcher, test, "a", "b", group="one")


@pytest.mark.parametrize(
    ("names", "budget_mib", "told"),
    [
        # What its process keeps of the card is more than the other can spare.
        (("clinging", "b"), 10_000, ["/sleep?level=1"]),
        # There is no main memory for its weights.
        (("a", "b"), 3_000, []),
        (("sleepless", "b"), 10_000, ["/sleep?level=1"]),
        (("plain", "b"), 10_000, []),
    ],
)
def test_one_that_cannot_sleep_is_unloaded(
    launcher: Sleepers, names: tuple[str, str], budget_mib: int, told: list[str]
) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        [a, b] = engines
        await load(supervisor, a)
        await load(supervisor, b)
        assert a.state is EngineState.UNLOADED
        assert a.pid is None
        assert launcher.told(a.model.name) == told
        await load(supervisor, a)

    run(launcher, test, *names, budget_mib=budget_mib)


def test_one_whose_process_ends_in_its_sleep_starts_anew(launcher: Sleepers) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        [a, b] = engines
        await load(supervisor, a)
        await load(supervisor, b)
        assert a.pid is not None
        for process in psutil.Process(a.pid).children():
            process.kill()
        await a.gone()
        assert a.state is EngineState.UNLOADED
        assert not a.shares_mib
        assert a.restarts == 0
        await load(supervisor, a)
        assert launcher.told("a") == ["/sleep?level=1"]

    run(launcher, test, "a", "b")


def test_one_that_does_not_wake_says_so_and_starts_anew(launcher: Sleepers) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        [a, b] = engines
        await load(supervisor, a)
        await load(supervisor, b)
        with pytest.raises(EngineStartError, match="/wake_up"):
            await load(supervisor, a)
        assert a.state is EngineState.UNLOADED
        assert not a.shares_mib
        assert b.state is EngineState.ASLEEP
        await load(supervisor, a)

    run(launcher, test, "dead", "b")


def test_another_config_of_one_that_sleeps_ends_its_process(launcher: Sleepers) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        [a, b] = engines
        await load(supervisor, a)
        await load(supervisor, b)
        a.take_up(a.model, None)
        await a.gone()
        assert a.state is EngineState.UNLOADED
        await load(supervisor, a)

    run(launcher, test, "a", "b")


def test_requests_wake_who_sleeps(launcher: Sleepers) -> None:
    async def test(supervisor: Supervisor, engines: list[Engine]) -> None:
        admission = Admission(Metrics())
        swapper = Swapper(supervisor, admission, lambda: 30.0)
        swapping = asyncio.create_task(swapper.run())
        owner = Tenancy(tenant="-", weight=1.0, priority="interactive")
        for engine in (*engines, *engines):
            ticket = admission.enter(engine, owner, 1)
            await ticket.wait()
            assert engine.endpoint is not None
            ticket.release(1)
        swapping.cancel()
        await asyncio.gather(swapping, return_exceptions=True)
        assert launcher.told("a") == ["/sleep?level=1", "/wake_up", "/sleep?level=1"]
        assert launcher.told("b") == ["/sleep?level=1", "/wake_up"]

    run(launcher, test, "a", "b")
