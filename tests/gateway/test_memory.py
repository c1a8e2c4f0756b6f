"""The gateway's memory: streams that wait cost little, and those that have ended nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from loadtest.benchmarks.gateway.engine import WAIT
from loadtest.benchmarks.gateway.load import Client, Target, open_idle
from tests.processes import Program, RigServer, wait_for, write_config

MODEL = "smollm2-135m"
_IDLE_STREAMS = 200
_QUICK_STREAMS = 500
_MIB = 2**20


class FakeRig(RigServer):
    """A server whose engine streams without a model."""

    def __init__(self, config_path: Path) -> None:
        super().__init__(config_path)
        command = [sys.executable, "-m", "tools.fake_rig", "serve", str(config_path)]
        Program.__init__(self, command, self.base_url, {})

    @property
    def target(self) -> Target:
        """For the benchmark's clients."""
        return Target("rigserve", self.base_url, MODEL)

    @property
    def resident_mib(self) -> float:
        """Memory of the gateway's process."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / _MIB


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[FakeRig]:
    folder = tmp_path_factory.mktemp("rig")
    with FakeRig(write_config(folder, cache_dir, max_sequences=256)) as server:
        server.wait_until_ready()
        asyncio.run(quick_streams(server.target, 100))  # what is made once is made
        yield server


async def quick_streams(target: Target, count: int) -> None:
    """One after the other, over one connection."""
    client = await Client.connect(target)
    for _ in range(count):
        await client.begin(target.chat(max_tokens=4, stream=True))
    client.close()


def test_idle_streams_are_small(rig: FakeRig) -> None:
    async def growth_mib() -> float:
        before = rig.resident_mib
        request = rig.target.chat(WAIT, max_tokens=4, stream=True)
        crowd = await open_idle(rig.target, [request] * _IDLE_STREAMS)
        grown = rig.resident_mib - before
        for client in crowd:
            client.close()
        return grown

    assert asyncio.run(growth_mib()) < 0.15 * _IDLE_STREAMS
    wait_for(lambda: not rig.total("rigserve_requests_in_flight"), "all have ended")


def test_streams_that_ended_leave_nothing(rig: FakeRig) -> None:
    asyncio.run(quick_streams(rig.target, _QUICK_STREAMS))
    before = rig.resident_mib
    asyncio.run(quick_streams(rig.target, _QUICK_STREAMS))
    # A leak of a few KiB a stream would be more.
    assert rig.resident_mib - before < 3
