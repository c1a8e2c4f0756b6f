"""A replica: an actor of Ray's that runs one engine on its node, and tells what that prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import AsyncIterator

import ray

from serving import __version__
from serving.cluster.door import Door, open_door
from serving.cluster.task import Task
from serving.config import VllmModel
from serving.engines import guard
from serving.engines.launch import Launch, free_port
from serving.hardware.memory import gpus
from serving.models.sources import ModelError
from serving.site import launchers_of

# How often it tells that it is alive when its engine prints nothing.
BEAT_SECONDS = 2.0
_LINES_KEPT = 500


class Replica:
    """Runs one engine to its end. What it learns of it, its keeper sees to."""

    def __init__(
        self, task: Task, api_key: str, secret: bytes, version: str, *, on_gpus: bool
    ) -> None:
        self._task = task
        self._api_key = api_key
        self._secret = secret
        self._version = version
        self._on_gpus = on_gpus
        self._port = free_port()
        self._process: asyncio.subprocess.Process | None = None

    async def open(self) -> Door:
        """Open the door to the engine that is to be."""
        if self._version != __version__:
            raise RuntimeError(
                f"this node has rigserve {__version__}, the gateway {self._version}; install the same on both"
            )
        host = ray.util.get_node_ip_address()
        self._server, door = await open_door(host, self._secret, self._port)
        return door

    async def run(self) -> AsyncIterator[str]:
        """Make the model's files ready and run its engine: its lines, an empty one now and then, and last how it ended."""
        task = self._task
        launcher = launchers_of(task.config)[task.model.engine]
        preparing = asyncio.create_task(asyncio.to_thread(launcher.prepare, task.model))
        while not (await asyncio.wait((preparing,), timeout=BEAT_SECONDS))[0]:
            yield ""
        try:
            files = preparing.result()
            launch = launcher.launch(task.model, files, self._port, self._api_key, self._cards())
        except ModelError as error:
            yield str(error)
            return
        async for line in self._run(launch):
            yield line

    async def _run(self, launch: Launch) -> AsyncIterator[str]:
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guard.__file__, *launch.command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**self._environment(), **launch.environment},
            limit=2**20,
        )
        assert process.stdout is not None
        last = deque[str](maxlen=_LINES_KEPT)
        reading = asyncio.create_task(process.stdout.readline())
        while True:
            if not (await asyncio.wait((reading,), timeout=BEAT_SECONDS))[0]:
                yield ""
                continue
            line = reading.result().decode("utf-8", errors="replace").rstrip("\n")
            if not reading.result():
                break
            last.append(line)
            yield line
            reading = asyncio.create_task(process.stdout.readline())
        code = await process.wait()
        told = launch.explain(last)
        yield f"the engine exited with code {code}{f': {told}' if told else ''}"

    def _cards(self) -> tuple[str, ...] | None:
        """The cards that Ray has given it; None for all that its environment shows."""
        if not self._on_gpus:
            return ()
        given = {str(index) for index in ray.get_gpu_ids()}
        return tuple(gpu.uuid for gpu in gpus() if str(gpu.index) in given) or None

    def _environment(self) -> dict[str, str]:
        model = self._task.model
        if isinstance(model, VllmModel) and model.over_nodes:
            # It finds the cluster, and sees its node's cards, of which this actor has none.
            address = ray.get_runtime_context().gcs_address
            host = ray.util.get_node_ip_address()
            inherited = {**os.environ, "RAY_ADDRESS": address, "VLLM_HOST_IP": host}
            inherited.pop("CUDA_VISIBLE_DEVICES", None)
            return inherited
        return dict(os.environ)

    async def stop(self) -> None:
        """End the engine; returns when its memory is free."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()
