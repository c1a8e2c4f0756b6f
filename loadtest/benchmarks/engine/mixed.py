"""Point 2: streams that decode while long prompts keep arriving."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator

import aiohttp

from loadtest.benchmarks.engine.prompts import Corpus, Prompts
from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    LOGICAL_BATCH_TOKENS,
    RIGSERVE,
    STEP_TOKENS,
    Rig,
    Server,
    in_turns,
    require_full,
    servers,
)
from loadtest.benchmarks.engine.table import Figures, Results, percentile
from loadtest.benchmarks.streams import Reply

_STREAMS, _STREAM_PROMPT_TOKENS = 12, 78
_LONG_PROMPT_TOKENS, _LONG_OUTPUT_TOKENS = 1500, 8
# Those that send long prompts, each its next one when the last is answered.
_LONG_CLIENTS = 2
# Time for a server to notice that its clients have gone, before it is stopped.
_SETTLE_SECONDS = 2
_WANTED = {"ITL p99, ms": "≤ 1.00", "tok/s in all": "≥ 0.95"}


def measure(rig: Rig, long_prompts: int, rounds: int) -> str:
    """Compare with llama-server; Markdown."""
    results = Results([RIGSERVE, LLAMA_SERVER])
    with servers(rig, [RIGSERVE, LLAMA_SERVER]) as running:
        corpus = Corpus.of(running[0])
        for number, server in in_turns(running, rounds):
            figures = asyncio.run(_mix(rig, server, corpus.prompts(number), long_prompts))
            results.add(server.name, figures)
    return results.markdown(
        "Mixed load",
        _WANTED,
        f"{_STREAMS} streams decode while {_LONG_CLIENTS} clients send {long_prompts} prompts of {_LONG_PROMPT_TOKENS} "
        f"tokens, one after the other, for {_LONG_OUTPUT_TOKENS} tokens each; tokens of prompts and outputs. {rounds} rounds. "
        f"rigserve: at most {STEP_TOKENS} prompt tokens a step; llama-server: -b {LOGICAL_BATCH_TOKENS} "
        f"-ub {STEP_TOKENS}, its defaults.",
    )


async def _mix(rig: Rig, server: Server, prompts: Prompts, long_prompts: int) -> Figures:
    limit = rig.context_length - _STREAM_PROMPT_TOKENS
    streams = [
        server.complete(prompts.new(_STREAM_PROMPT_TOKENS), max_tokens=limit, **server.endless)
        for _ in range(_STREAMS)
    ]
    long = iter([prompts.new(_LONG_PROMPT_TOKENS) for _ in range(long_prompts)])
    async with server.awake() as session:
        tasks = [asyncio.create_task(stream.run(session)) for stream in streams]
        while not all(stream.answering for stream in streams) and not any(map(_done, tasks)):  # noqa: ASYNC110 (an event would not tell of a failure)
            await asyncio.sleep(0.05)
        started = time.perf_counter()
        answered = await asyncio.gather(
            *(_send_long(server, session, long) for _ in range(_LONG_CLIENTS))
        )
        ended = time.perf_counter()
        if any(map(_done, tasks)):
            raise RuntimeError("a stream ended before the long prompts; lower --long-prompts")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(_SETTLE_SECONDS)
    gaps = [
        later - earlier
        for stream in streams
        for earlier, later in itertools.pairwise(stream.reply().chunks_at)
        if started < later <= ended
    ]
    tokens = len(gaps) + long_prompts * (_LONG_PROMPT_TOKENS + _LONG_OUTPUT_TOKENS)
    ttfts = [reply.ttft_seconds for replies in answered for reply in replies]
    return {
        "streams' ITL p50, ms": percentile(gaps, 50) * 1000,
        "streams' ITL p99, ms": percentile(gaps, 99) * 1000,
        "long prompts' TTFT p50, ms": statistics.median(ttfts) * 1000,
        "tok/s in all": tokens / (ended - started),
    }


def _done(task: asyncio.Task[None]) -> bool:
    """Whether a stream has ended; raises the error that it ended with."""
    return task.done() and task.result() is None


async def _send_long(
    server: Server, session: aiohttp.ClientSession, prompts: Iterator[list[int]]
) -> list[Reply]:
    replies = []
    for prompt in prompts:
        stream = server.complete(prompt, max_tokens=_LONG_OUTPUT_TOKENS, **server.endless)
        await stream.run(session)
        replies.append(require_full(stream.reply(), _LONG_OUTPUT_TOKENS))
    return replies
