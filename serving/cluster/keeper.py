"""``python -m serving.cluster.keeper``: to the supervisor an engine on a loopback port, while the engine is on a node.

It finds the replica a node, leads to its door, and prints what the engine prints. It ends with the engine, or when the
node is lost; with it ends the replica. Ray is here and not in the gateway, whose process no fault of Ray's can end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import filelock
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serving import __version__
from serving.cluster.door import Door, new_secret, open_tunnel
from serving.cluster.nodes import join, nodes, shares
from serving.cluster.placing import Node, Share, needed, place
from serving.cluster.replica import Replica
from serving.cluster.task import VARIABLE, Task

_LOOK_SECONDS = 1.0
# What may take longer than an import: what was free when it was looked at is not, or its node has gone.
_BIRTH_SECONDS = 60.0
# A node that is switched off says nothing: Ray takes its time to be sure of it.
_SILENCE_SECONDS = 15.0


async def keep(task: Task, api_key: str) -> int:
    """Have a replica until its engine ends or its node is lost (then 1), or until SIGTERM (then 0)."""
    try:
        join(task.address)
    except ConnectionError as error:
        _tell(f"{task.name}: there is no Ray cluster at {task.address} (cluster.address): {error}")
        return 1
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    work = asyncio.create_task(_keep(task, api_key))
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.cancel()
        await asyncio.wait((work,))
        return 0
    work.result()
    return 1


async def _keep(task: Task, api_key: str) -> None:
    secret = new_secret()
    replica: Any = None
    try:
        while True:
            replica, share = await _placed(task, api_key, secret)
            _tell(f"{task.name}: on node {share.node}, with {_shown(share)}")
            try:
                async with asyncio.timeout(_BIRTH_SECONDS):
                    door: Door = await replica.open.remote()
                break
            except (TimeoutError, ray.exceptions.RayActorError) as error:
                _tell(f"{task.name}: it does not come up there: {str(error) or 'no answer'}")
                ray.kill(replica)
        async with await open_tunnel(task.port, door, secret):
            async for line in _lines(replica):
                if line:
                    _tell(line)
    except ray.exceptions.RayActorError as error:
        _tell(f"{task.name}: its node is lost, or its replica: {error}")
    except ray.exceptions.RayTaskError as error:
        _tell(f"{task.name}: it cannot run there: {error.cause}")
    except TimeoutError:
        _tell(f"{task.name}: its node has been silent for {_SILENCE_SECONDS:g} s")
    except asyncio.CancelledError:
        if replica is not None:
            # Its memory is free before others are told so.
            with contextlib.suppress(ray.exceptions.RayActorError):
                await replica.stop.remote()
        raise


async def _placed(task: Task, api_key: str, secret: bytes) -> tuple[Any, Share]:
    """A replica on a node that has the room; waits until there is one."""
    told = ""
    while True:
        # Between a look and the birth of an actor no other keeper looks.
        with filelock.FileLock(task.lock):
            there = nodes()
            share = place(task.want, task.name, there, shares())
            if share is not None:
                return _born(task, api_key, secret, share), share
        missing = f"{task.name}: waits for room: no node has {needed(task.want, there)}; nodes: {_told(there)}"
        if missing != told:
            _tell(missing)
            told = missing
        await asyncio.sleep(_LOOK_SECONDS)


def _born(task: Task, api_key: str, secret: bytes, share: Share) -> Any:
    remote = ray.remote(Replica).options(
        name=share.to_name(),
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        memory=share.memory_mib * 2**20,
        max_restarts=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(share.node, soft=False),
    )
    return remote.remote(task, api_key, secret, __version__, on_gpus=share.on_gpus)


async def _lines(replica: Any) -> AsyncIterator[str]:
    """What the engine prints; raises ``RayActorError`` or ``TimeoutError`` when its node is lost."""
    lines = aiter(replica.run.options(num_returns="streaming").remote())
    while True:
        async with asyncio.timeout(_SILENCE_SECONDS):
            try:
                line: str = await (await anext(lines))
            except StopAsyncIteration:
                return
        yield line


def _told(there: list[Node]) -> str:
    told = [
        f"{node.id[:8]} ({_cards(node)}{node.memory_mib} MiB, {node.cpus:g} cores)"
        for node in there
    ]
    return ", ".join(told) or "none"


def _cards(node: Node) -> str:
    return f"{node.gpus:g} cards of {node.gpu_mib or '?'} MiB, " if node.gpus else ""


def _shown(share: Share) -> str:
    what = f"{share.gpus:g} cards" if share.gpus else f"{share.cpus:g} cores"
    return f"{what} and {share.memory_mib} MiB of main memory"


def _tell(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    """The process's work; its task and the engine's key are in the environment."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    return asyncio.run(
        keep(Task.from_json(os.environ[VARIABLE]), os.environ["RIGSERVE_ENGINE_KEY"])
    )


if __name__ == "__main__":
    sys.exit(main())
