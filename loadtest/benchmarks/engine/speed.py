"""Points 1 and 4: output tokens per second, latencies, and where a step's time goes."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from loadtest.benchmarks.engine.prompts import Prompts
from loadtest.benchmarks.engine.servers import (
    EXAMPLE,
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

PROMPT_TOKENS = 78
_BATCHED_BENCH = "llama-batched-bench"
# By the peer, and clients (None: any number of them).
_WANTED = {(LLAMA_SERVER, None): 1.0, (EXAMPLE, 16): 1.25, (_BATCHED_BENCH, 16): 0.92}


@dataclass(frozen=True, slots=True)
class Wave:
    """Streams started at once, until the last has ended. Without a server in between: no latencies."""

    tokens_per_second: float
    ttft_p50_seconds: float | None = None
    itl_p50_seconds: float | None = None
    itl_p99_seconds: float | None = None


def measure(
    rig: Rig, names: Sequence[str], clients: Sequence[int], output_tokens: int, rounds: int
) -> str:
    """Compare; Markdown."""
    waves: dict[tuple[int, str], list[Wave]] = defaultdict(list)
    split: dict[str, float] = defaultdict(float)
    with servers(rig, names) as running:
        prompts = Prompts.of(running[0])
        for server in running:  # warm up
            asyncio.run(_wave(server, [prompts.new(PROMPT_TOKENS)] * 2, output_tokens))
        for number in range(rounds):
            for count in clients:
                batch = [prompts.new(PROMPT_TOKENS) for _ in range(count)]
                for server in rotated(running, number):
                    wave, seconds = asyncio.run(_wave(server, batch, output_tokens))
                    waves[count, server.name].append(wave)
                    if count == max(clients):
                        for part, spent in seconds.items():
                            split[part] += spent
            for count, wave in _batched_bench(rig, clients, output_tokens).items():
                waves[count, _BATCHED_BENCH].append(wave)
    rows = [
        row
        for count in clients
        for name in (*names, _BATCHED_BENCH)
        for row in [_row(count, name, waves[count, name], waves[count, RIGSERVE])]
    ]
    return section(
        "Speed",
        ["clients", "server", "output tok/s", "rigserve ÷ it", "wanted", "TTFT p50", "ITL p50", "ITL p99"],
        rows,
        f"{PROMPT_TOKENS} prompt tokens, {output_tokens} generated a stream, all streams started at once; tokens "
        f"over the time to the end of the last, prompts included; {rounds} rounds, {rig.slots} slots of "
        f"{rig.context_length} tokens.\n\n{_split_note(split, max(clients))}",
    )  # fmt: skip


async def _wave(
    server: Server, prompts: Sequence[list[int]], output_tokens: int
) -> tuple[Wave, dict[str, float]]:
    """Also the seconds that rigserve spent on each part of its steps; of others, none."""
    async with server.awake() as session:
        before = await _step_seconds(server, session)
        streams = [
            server.complete(prompt, max_tokens=output_tokens, **server.endless)
            for prompt in prompts
        ]
        started = time.perf_counter()
        await asyncio.gather(*(stream.run(session) for stream in streams))
        seconds = time.perf_counter() - started
        after = await _step_seconds(server, session)
    replies = [require_full(stream.reply(), output_tokens) for stream in streams]
    gaps = [gap for reply in replies for gap in reply.gaps_seconds]
    wave = Wave(
        len(prompts) * output_tokens / seconds,
        statistics.median(reply.ttft_seconds for reply in replies),
        percentile(gaps, 50),
        percentile(gaps, 99),
    )
    return wave, {part: spent - before[part] for part, spent in after.items()}


async def _step_seconds(server: Server, session: aiohttp.ClientSession) -> dict[str, float]:
    if server.name != RIGSERVE:
        return {}
    seconds: dict[str, float] = (await server.statistics(session))["step_seconds"]
    return seconds


def _batched_bench(rig: Rig, clients: Sequence[int], output_tokens: int) -> dict[int, Wave]:
    """The same work without a server: tokens over the time of prompts and generation together."""
    counts = ",".join(map(str, clients))
    flags = {"-m": rig.model_path, "-c": rig.context_length * rig.slots, "-b": LOGICAL_BATCH_TOKENS,
             "-ub": STEP_TOKENS, "-t": rig.threads, "-npp": PROMPT_TOKENS, "-ntg": output_tokens,
             "-npl": counts, "--output-format": "jsonl"}  # fmt: skip
    words = [str(word) for flag in flags.items() for word in flag]
    done = subprocess.run(
        [rig.peers.batched_bench, *words],
        env={**os.environ, **rig.peers.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {each["pl"]: Wave(each["pl"] * each["tg"] / each["t"]) for each in results}


def _row(clients: int, name: str, waves: Sequence[Wave], ours: Sequence[Wave]) -> list[str]:
    def median(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return milliseconds(statistics.median(known)) if known else ""

    speed = statistics.median(wave.tokens_per_second for wave in waves)
    our_speed = statistics.median(wave.tokens_per_second for wave in ours)
    wanted = _WANTED.get((name, None)) or _WANTED.get((name, clients))
    return [
        str(clients),
        name,
        f"{speed:.1f}",
        ratio(our_speed, speed) if name != RIGSERVE else "",
        f"≥ {wanted:.2f}" if wanted else "",
        median([wave.ttft_p50_seconds for wave in waves]),
        median([wave.itl_p50_seconds for wave in waves]),
        median([wave.itl_p99_seconds for wave in waves]),
    ]


def _split_note(split: dict[str, float], clients: int) -> str:
    whole = sum(split.values())
    parts = ", ".join(f"{part} {seconds / whole:.1%}" for part, seconds in split.items())
    outside = 1 - split["decode"] / whole
    return (
        f"rigserve's steps at {clients} streams: {parts}. Outside of llama.cpp's decode, so Python's share "
        f"at most: **{outside:.1%}** (wanted: ≤ 5 %)."
    )
