"""Point 2: streams that decode while long prompts keep arriving."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import aiohttp

from loadtest.benchmarks.engine.prompts import Prompts
from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    LOGICAL_BATCH_TOKENS,
    RIGSERVE,
    STEP_TOKENS,
    Rig,
    Server,
    require_full,
    rotated,
    servers,
)
from loadtest.benchmarks.engine.table import milliseconds, percentile, ratio, section
from loadtest.benchmarks.streams import Reply

_STREAMS = 12
_STREAM_PROMPT_TOKENS = 78
_LONG_PROMPT_TOKENS = 1500
_LONG_OUTPUT_TOKENS = 8
# Those that send long prompts, each its next one when the last is answered.
_LONG_CLIENTS = 2
# Time for a server to notice that its clients have gone, before it is stopped.
_SETTLE_SECONDS = 2


@dataclass(frozen=True, slots=True)
class Mix:
    """From the first long prompt's sending to the last one's end."""

    itl_p50_seconds: float
    itl_p99_seconds: float
    tokens_per_second: float
    long_ttft_p50_seconds: float


def measure(rig: Rig, long_prompts: int, rounds: int) -> str:
    """Compare with llama-server; Markdown."""
    mixes: dict[str, list[Mix]] = defaultdict(list)
    with servers(rig, [RIGSERVE, LLAMA_SERVER]) as running:
        prompts = Prompts.of(running[0])
        for number in range(rounds):
            short = [prompts.new(_STREAM_PROMPT_TOKENS) for _ in range(_STREAMS)]
            long = [prompts.new(_LONG_PROMPT_TOKENS) for _ in range(long_prompts)]
            for server in rotated(running, number):
                mixes[server.name].append(asyncio.run(_mix(rig, server, short, long)))
    ours, theirs = (
        [statistics.median(column) for column in zip(*map(_figures, mixes[name]), strict=True)]
        for name in (RIGSERVE, LLAMA_SERVER)
    )
    return section(
        "Mixed load",
        ["", "rigserve", "llama-server", "ratio", "wanted"],
        [
            ["ITL p99 of the streams", *_compared(ours[1], theirs[1]), "≤ 1.00"],
            ["ITL p50 of the streams", *_compared(ours[0], theirs[0]), ""],
            ["tokens per second, prompts and outputs",
             f"{ours[2]:.0f}", f"{theirs[2]:.0f}", ratio(ours[2], theirs[2]), "≥ 0.95"],
            ["TTFT p50 of the long prompts", *_compared(ours[3], theirs[3]), ""],
        ],
        f"{_STREAMS} streams decode while {_LONG_CLIENTS} clients send {long_prompts} prompts of "
        f"{_LONG_PROMPT_TOKENS} tokens, one after the other, for {_LONG_OUTPUT_TOKENS} tokens each; {rounds} rounds. "
        f"rigserve: at most {STEP_TOKENS} prompt tokens a step; llama-server: -b {LOGICAL_BATCH_TOKENS} "
        f"-ub {STEP_TOKENS}, its defaults.",
    )  # fmt: skip


async def _mix(
    rig: Rig, server: Server, short: Sequence[list[int]], long: Sequence[list[int]]
) -> Mix:
    room = rig.context_length - _STREAM_PROMPT_TOKENS
    async with server.awake() as session:
        streams = [server.complete(each, max_tokens=room, **server.endless) for each in short]
        tasks = [asyncio.create_task(stream.run(session)) for stream in streams]
        while not all(stream.answering for stream in streams):
            await asyncio.sleep(0.05)
            if failed := next((task for task in tasks if task.done()), None):
                failed.result()
        started = time.perf_counter()
        waiting = iter(long)
        answered = await asyncio.gather(
            *(_send_long(server, session, waiting) for _ in range(_LONG_CLIENTS))
        )
        ended = time.perf_counter()
        if any(task.done() for task in tasks):
            raise RuntimeError("a stream ended before the long prompts; lower --long-prompts")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(_SETTLE_SECONDS)
    gaps = [
        later - earlier
        for stream in streams
        for chunks in [stream.reply().chunks_at]
        for earlier, later in itertools.pairwise(chunks)
        if started < later <= ended
    ]
    replies = [reply for each in answered for reply in each]
    tokens = len(gaps) + len(long) * (_LONG_PROMPT_TOKENS + _LONG_OUTPUT_TOKENS)
    return Mix(
        percentile(gaps, 50),
        percentile(gaps, 99),
        tokens / (ended - started),
        statistics.median(reply.ttft_seconds for reply in replies),
    )


async def _send_long(
    server: Server, session: aiohttp.ClientSession, waiting: Iterator[list[int]]
) -> list[Reply]:
    replies = []
    for prompt in waiting:
        stream = server.complete(prompt, max_tokens=_LONG_OUTPUT_TOKENS, **server.endless)
        await stream.run(session)
        replies.append(require_full(stream.reply(), _LONG_OUTPUT_TOKENS))
    return replies


def _figures(mix: Mix) -> tuple[float, ...]:
    return (
        mix.itl_p50_seconds,
        mix.itl_p99_seconds,
        mix.tokens_per_second,
        mix.long_ttft_p50_seconds,
    )


def _compared(ours: float, theirs: float) -> list[str]:
    return [milliseconds(ours), milliseconds(theirs), ratio(ours, theirs)]
