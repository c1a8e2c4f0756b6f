"""Ten times as many clients as an engine has slots for: it gets as much done as with just enough of them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp

from tests.processes import RigServer, write_config

SLOTS = 4
ROUND_SECONDS = 5.0
DEADLINE_SECONDS = 1.5
# The rest of the machine takes some from either; a collapse leaves next to nothing.
NOISE = 0.8


async def answers_a_second(rig: RigServer, clients: int) -> float:
    """What ``clients`` get done that ask again and again, and wait as long as they are told to."""
    statuses: list[int] = []
    began_at = time.monotonic()
    url = rig.base_url + "/v1/chat/completions"
    headers = {"x-rigserve-deadline-seconds": str(DEADLINE_SECONDS)}

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        body: dict[str, Any] = {
            "model": "smollm2-135m", "max_tokens": 16, "ignore_eos": True, "user": str(number),
        }  # fmt: skip
        turn = 0
        while time.monotonic() - began_at < ROUND_SECONDS:
            turn += 1
            text = f"Client {number} asks for the {turn}. time: what is the sea?"
            messages = [{"role": "user", "content": text}]
            async with session.post(url, json=body | {"messages": messages}) as answer:
                await answer.read()
                statuses.append(answer.status)
                if answer.status == 503:
                    await asyncio.sleep(float(answer.headers["retry-after"]))

    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector, headers=headers) as session,
        asyncio.TaskGroup() as group,
    ):
        for number in range(clients):
            group.create_task(client(session, number))
    assert set(statuses) <= {200, 503}
    if clients > SLOTS:
        assert 503 in statuses, "there was no overload"
    return statuses.count(200) / (time.monotonic() - began_at)


def test_overload_leaves_an_engine_what_it_can_do(tmp_path: Path, cache_dir: Path) -> None:
    with RigServer(write_config(tmp_path, cache_dir, max_sequences=SLOTS)) as rig:
        rig.wait_until_ready()
        asyncio.run(answers_a_second(rig, SLOTS))  # it learns how long requests take
        peak = overload = 0.0
        for _ in range(2):
            peak = max(peak, asyncio.run(answers_a_second(rig, SLOTS)))
            overload = max(overload, asyncio.run(answers_a_second(rig, 10 * SLOTS)))
    print(f"{peak:.2f} answers/s with {SLOTS} clients, {overload:.2f} with {10 * SLOTS}")
    assert overload >= NOISE * peak
