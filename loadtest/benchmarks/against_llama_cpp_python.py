"""Output tokens per second of concurrent streams: rigserve beside llama-cpp-python's own server.

Both serve the same model file with the same library build, threads and context, on one machine, in turns.
rigserve is measured whole, through its gateway. Every stream generates exactly ``--output-tokens`` tokens: a
logit bias forbids the end-of-sequence token, and the finish reason is checked.

    pip install 'llama-cpp-python[server]'
    python -m loadtest.benchmarks.against_llama_cpp_python --model-path MODEL.gguf
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import aiohttp
import yaml

from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.results import publish
from loadtest.benchmarks.streams import Stream

_MODEL = "model"


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement of one server."""

    output_tokens_per_second: float
    ttft_p50_seconds: float


def main() -> int:
    """Parse, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", type=Path, required=True, help="GGUF file for both")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="concurrent streams")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each server")
    parser.add_argument("--requests", type=int, default=2, help="requests of a client in a round")
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--eos-token", type=int, default=2, help="id of the model's EOS token")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    args = parser.parse_args()
    with ExitStack() as stack:
        servers = {
            "rigserve": stack.enter_context(_rigserve(args.model_path, args.threads)),
            "llama_cpp.server": stack.enter_context(
                _llama_cpp_server(args.model_path, args.threads)
            ),
        }
        results = asyncio.run(_measure(servers, args))
    table = _table(results, args)
    publish(table, args.out)
    return 0


async def _measure(
    servers: dict[str, str], args: argparse.Namespace
) -> dict[tuple[str, int], list[Round]]:
    results: dict[tuple[str, int], list[Round]] = {}
    serial = iter(range(10**9))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        for base_url in servers.values():
            await _stream(session, base_url, next(serial), args)  # warm-up
        for clients in args.clients:
            for number in range(args.rounds):
                for name, base_url in servers.items():
                    measured = await _round(session, base_url, clients, serial, args)
                    results.setdefault((name, clients), []).append(measured)
                    print(
                        f"round {number + 1}/{args.rounds}, {clients} clients, {name}: "
                        f"{measured.output_tokens_per_second:.1f} tok/s",
                        file=sys.stderr,
                    )
    return results


async def _round(
    session: aiohttp.ClientSession,
    base_url: str,
    clients: int,
    serial: Iterator[int],
    args: argparse.Namespace,
) -> Round:
    async def client() -> list[float]:
        return [await _stream(session, base_url, next(serial), args) for _ in range(args.requests)]

    started = time.monotonic()
    ttfts = await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.monotonic() - started
    tokens = clients * args.requests * args.output_tokens
    return Round(tokens / seconds, statistics.median(ttft for one in ttfts for ttft in one))


async def _stream(
    session: aiohttp.ClientSession, base_url: str, number: int, args: argparse.Namespace
) -> float:
    """One request, read to its end; returns its time to the first token in seconds."""
    body = {
        "model": _MODEL,
        "temperature": 0,
        "max_tokens": args.output_tokens,
        "logit_bias": {str(args.eos_token): -100},
        "messages": [{"role": "user", "content": _prompt(number)}],
    }
    stream = Stream(f"{base_url}/chat/completions", body)
    await stream.run(session)
    reply = stream.reply()
    if reply.finish_reason != "length":
        raise RuntimeError(
            f"{base_url}: a stream ended with {reply.finish_reason!r}, not after all its tokens"
        )
    return reply.ttft_seconds


def _prompt(number: int) -> str:
    # The number comes first, so that no two prompts share a prefix that could be cached.
    text = (
        "Describe a voyage across the ocean, the ship, its captain and crew, the weather they met. "
    )
    return f"{number * 7919}: {text * 2}"


@contextmanager
def _rigserve(model_path: Path, threads: int) -> Iterator[str]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "server": {"port": port},
            "models": [
                {"name": _MODEL, "source": str(model_path.resolve()), "engine": "llama_cpp",
                 "context_length": 512, "threads": threads}
            ],
            "storage": {"cache_dir": folder, "data_dir": folder},
        }  # fmt: skip
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "serving", "serve", str(path)]
        with running(command, f"http://127.0.0.1:{port}/ready"):
            yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def _llama_cpp_server(model_path: Path, threads: int) -> Iterator[str]:
    port = free_port()
    # Without interrupt_requests=false a new request would break off the one before it.
    flags = {"model": model_path, "model_alias": _MODEL, "host": "127.0.0.1", "port": port,
             "n_ctx": 512, "n_threads": threads, "n_threads_batch": threads,
             "interrupt_requests": "false", "verbose": "false"}  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "llama_cpp.server", *words]
    with running(command, f"http://127.0.0.1:{port}/v1/models"):
        yield f"http://127.0.0.1:{port}/v1"


def _table(results: dict[tuple[str, int], list[Round]], args: argparse.Namespace) -> str:
    lines = [
        f"\n## {date.today()}: rigserve and llama-cpp-python's server\n",
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"llama-cpp-python {version('llama-cpp-python')}, {args.model_path.name}, {args.threads} threads; "
        f"{args.rounds} rounds in turns, medians.\n",
        f"Command: `python -m loadtest.benchmarks.{Path(__file__).stem} {' '.join(sys.argv[1:])}`\n",
        "| clients | rigserve tok/s | llama_cpp.server tok/s | ratio | rigserve TTFT p50 | llama_cpp.server TTFT p50 |",
        "|---|---|---|---|---|---|",
    ]
    for clients in args.clients:
        ours, theirs = results["rigserve", clients], results["llama_cpp.server", clients]
        speed = [statistics.median(r.output_tokens_per_second for r in rs) for rs in (ours, theirs)]
        ttft = [statistics.median(r.ttft_p50_seconds for r in rs) for rs in (ours, theirs)]
        lines.append(
            f"| {clients} | {speed[0]:.1f} | {speed[1]:.1f} | **{speed[0] / speed[1]:.2f}** "
            f"| {ttft[0]:.2f} s | {ttft[1]:.2f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
