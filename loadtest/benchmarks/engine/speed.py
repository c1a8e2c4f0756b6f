"""Points 1 and 4: output tokens per second, latencies, and Python's share of a step."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence

from loadtest.benchmarks.engine.prompts import Corpus
from loadtest.benchmarks.engine.servers import (
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

_PROMPT_TOKENS = 78
_WAKING_TOKENS = 8
_BATCHED_BENCH = "llama-batched-bench"
_WANTED = {
    "16 clients: output tok/s": "llama-server ≥ 1.00, example-server ≥ 1.25, batched-bench ≥ 0.92",
    "output tok/s": "llama-server ≥ 1.00",
    "TTFT p50, ms": "llama-server ≤ 1.00",
    "outside of llama.cpp's decode, %": "≤ 5",
}


def measure(
    rig: Rig, beside: Sequence[str], clients: Sequence[int], output_tokens: int, rounds: int
) -> str:
    """Compare; Markdown."""
    names = [RIGSERVE, *beside]
    results = Results([*names, _BATCHED_BENCH])
    with servers(rig, names) as running:
        corpus = Corpus.of(running[0])
        for number, server in in_turns(running, rounds):
            prompts = corpus.prompts(number)
            for count in clients:
                batch = [prompts.new(_PROMPT_TOKENS) for _ in range(count)]
                results.add(server.name, asyncio.run(_wave(server, batch, output_tokens)))
            if server is running[0]:
                results.add(_BATCHED_BENCH, _batched_bench(rig, clients, output_tokens))
    return results.markdown(
        "Speed",
        _WANTED,
        f"{_PROMPT_TOKENS} prompt tokens, {output_tokens} generated a stream, all streams of a round started at once; "
        "tokens over the time until the last has ended, prompts included; each server has answered something just before. "
        f"{rounds} rounds; {rig.slots} slots of {rig.context_length} tokens.",
    )


async def _wave(server: Server, prompts: Sequence[list[int]], output_tokens: int) -> Figures:
    streams = [
        server.complete(prompt, max_tokens=output_tokens, **server.endless) for prompt in prompts
    ]
    async with server.awake() as session:
        # A process that was stopped for a minute may have lost pages and caches.
        waking = server.complete(prompts[0][::-1], max_tokens=_WAKING_TOKENS, **server.endless)
        await waking.run(session)
        before = await server.statistics(session)
        started = time.perf_counter()
        await asyncio.gather(*(stream.run(session) for stream in streams))
        seconds = time.perf_counter() - started
        after = await server.statistics(session)
    replies = [require_full(stream.reply(), output_tokens) for stream in streams]
    gaps = [gap for reply in replies for gap in reply.gaps_seconds]
    figures = {
        "output tok/s": len(prompts) * output_tokens / seconds,
        "TTFT p50, ms": statistics.median(reply.ttft_seconds for reply in replies) * 1000,
        "ITL p50, ms": percentile(gaps, 50) * 1000,
        "ITL p99, ms": percentile(gaps, 99) * 1000,
    }
    if after:
        spent = {
            part: seconds - before["step_seconds"][part]
            for part, seconds in after["step_seconds"].items()
        }
        outside = 1 - spent["decode"] / sum(spent.values())
        figures["of a step outside of llama.cpp's decode, %"] = outside * 100
    return {f"{_clients(len(prompts))}: {what}": value for what, value in figures.items()}


def _batched_bench(rig: Rig, clients: Sequence[int], output_tokens: int) -> Figures:
    """The same work without a server: tokens over the time of prompts and generation together."""
    flags = {"-m": rig.model_path, "-c": rig.context_length * rig.slots, "-b": LOGICAL_BATCH_TOKENS,
             "-ub": STEP_TOKENS, "-t": rig.threads, "-npp": _PROMPT_TOKENS, "-ntg": output_tokens,
             "-npl": ",".join(map(str, clients)), "--output-format": "jsonl"}  # fmt: skip
    done = subprocess.run(
        [rig.peers.program(_BATCHED_BENCH), *(str(word) for flag in flags.items() for word in flag)],
        env={**os.environ, **rig.peers.environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        f"{_clients(each['pl'])}: output tok/s": each["pl"] * each["tg"] / each["t"]
        for each in found
    }


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"
