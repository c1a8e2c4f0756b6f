"""rigserve's gateway beside nginx (a plain relay) and LiteLLM's proxy, before an engine as fast as can be.

    python -m loadtest.benchmarks.gateway --rounds 5

One process and worker each, pinned to one core; clients and engine share another. rigserve asks for a key with
limits, and meters. Rounds are interleaved, in random order.
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path

import uvloop

from loadtest.benchmarks.engine.table import Results, percentile, processor
from loadtest.benchmarks.gateway.engine import WAIT
from loadtest.benchmarks.gateway.load import Client, counts_per_second, open_idle
from loadtest.benchmarks.gateway.servers import (
    DIRECT,
    LITELLM,
    LITELLM_VERSION,
    MODELS,
    NGINX,
    Cores,
    Server,
    direct,
    litellm,
    nginx,
    rigserve,
)
from loadtest.benchmarks.results import publish

_CLIENTS = 32
_IDLE_STREAMS = 1000
_LONG_TOKENS = 1000
_SHORT_TOKENS = 4
_WARM_UP_SECONDS = 1.0
_MS, _MIB_IN_MB = 1000.0, 1.048576
# A relay that gives so much of what the clients can take may have waited for them.
_CLIENT_BOUND = 0.8
_SOAK_SAMPLES = 12

_CHUNKS, _ANSWERS = f"chunks/s, {_CLIENTS} clients", f"whole answers/s, {_CLIENTS} clients"
# At one client, so many requests follow each other before it is another server's turn.
_TURN_REQUESTS = 20
_TTFT_P50, _TTFT_P99 = "added TTFT p50 (ms), 1 client", "added TTFT p99 (ms), 1 client"
_RESIDENT, _IDLE = "memory after the rounds (MB)", f"memory with {_IDLE_STREAMS} idle streams (MB)"
_WANTED = {
    _CHUNKS: f"{NGINX} ≥ 0.25, {LITELLM} ≥ 10",
    _TTFT_P50: "≤ 1.5 ms",
    _TTFT_P99: "≤ 5 ms",
    _IDLE: "≤ 200 MB",
}


def main() -> int:
    """Measure, print Markdown."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the servers then, too
    cores = Cores.of_this_machine()
    try:
        with ExitStack() as stack:
            ours, engine_port = stack.enter_context(rigserve(cores))
            servers = [ours]
            if NGINX in args.beside:
                servers.append(stack.enter_context(nginx(cores, engine_port)))
            if LITELLM in args.beside:
                servers.append(stack.enter_context(litellm(cores, engine_port)))
            servers.append(direct(engine_port))
            cores.pin_me()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                report = _heading(cores) + runner.run(_measure(servers, args))
        publish(report, args.out)
    except RuntimeError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each server")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--ttft-requests", type=int, default=400, help="of each server")
    parser.add_argument("--beside", nargs="*", choices=[NGINX, LITELLM], default=[NGINX, LITELLM])
    parser.add_argument("--soak-minutes", type=float, default=0.0,
                        help="also stream so long, and watch rigserve's memory")  # fmt: skip
    parser.add_argument("--out", type=Path, help="also append the tables to this file")
    return parser.parse_args()


async def _measure(servers: Sequence[Server], args: argparse.Namespace) -> str:
    ours = servers[0]
    results = Results([server.name for server in servers])
    for server in servers:
        await _crowd(server, _LONG_TOKENS, stream=True, seconds=args.seconds)
    for what, tokens, stream in ((_CHUNKS, _LONG_TOKENS, True), (_ANSWERS, _SHORT_TOKENS, False)):
        for number in range(args.rounds):
            print(f"  round {number + 1} of {args.rounds}: {what}", file=sys.stderr, flush=True)
            for server in random.sample(servers, len(servers)):
                chunks, answers = await _crowd(server, tokens, stream=stream, seconds=args.seconds)
                results.add(server.name, {what: chunks if stream else answers})
    for name, figures in (await _added_ttft(servers, args.ttft_requests)).items():
        results.add(name, figures)
    for server in servers:
        if server.process_id:
            results.add(server.name, {_RESIDENT: server.resident_mib * _MIB_IN_MB})
    results.add(ours.name, {_IDLE: await _idle_mb(ours)})
    note = _bound_note(results, servers)
    table = results.markdown("The front door", _WANTED, note)
    if args.soak_minutes:
        table += await _soak(ours, args.soak_minutes * 60)
    return table


async def _crowd(
    server: Server, tokens: int, *, stream: bool, seconds: float
) -> tuple[float, float]:
    request = server.target.chat(max_tokens=tokens, stream=stream)
    return await counts_per_second(server.target, request, _CLIENTS, _WARM_UP_SECONDS, seconds)


async def _added_ttft(servers: Sequence[Server], requests: int) -> dict[str, dict[str, float]]:
    """Percentiles of each server's TTFT, less the same of the engine's own.

    Servers take turns, in each of which one client asks some times in a row.
    """
    print(f"  TTFT: {requests} requests of each", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {server.name: [] for server in servers}
    clients = {server.name: await Client.connect(server.target) for server in servers}
    for _ in range(requests // _TURN_REQUESTS):
        for server in random.sample(servers, len(servers)):
            request = server.target.chat(max_tokens=_SHORT_TOKENS, stream=True)
            for _ in range(_TURN_REQUESTS):
                seconds = await clients[server.name].ttft_seconds(request)
                found[server.name].append(seconds * _MS)
    for client in clients.values():
        client.close()
    own = found[DIRECT]
    return {
        name: {
            _TTFT_P50: statistics.median(times) - statistics.median(own),
            _TTFT_P99: percentile(times, 99) - percentile(own, 99),
        }
        for name, times in found.items()
        if name != DIRECT
    } | {DIRECT: {"TTFT p50 (ms), 1 client": statistics.median(own)}}


async def _idle_mb(server: Server) -> float:
    """Memory while all streams are open, and silent."""
    print(f"  {_IDLE_STREAMS} idle streams", file=sys.stderr, flush=True)
    requests = [
        server.target.chat(WAIT, MODELS[number % len(MODELS)], max_tokens=_LONG_TOKENS, stream=True)
        for number in range(_IDLE_STREAMS)
    ]
    crowd = await open_idle(server.target, requests)
    await asyncio.sleep(_WARM_UP_SECONDS)
    memory_mb = server.resident_mib * _MIB_IN_MB
    for client in crowd:
        client.close()
    return memory_mb


async def _soak(server: Server, seconds: float) -> str:
    """Memory over a long load of streams and hang-ups."""
    samples = [("0", server.resident_mib * _MIB_IN_MB)]
    began_at = time.monotonic()
    for _ in range(_SOAK_SAMPLES):
        await _crowd(server, _LONG_TOKENS, stream=True, seconds=seconds / _SOAK_SAMPLES / 2)
        await _crowd(server, _SHORT_TOKENS, stream=True, seconds=seconds / _SOAK_SAMPLES / 2)
        minutes = (time.monotonic() - began_at) / 60
        samples.append((f"{minutes:.1f}", server.resident_mib * _MIB_IN_MB))
        print(f"  soak: {minutes:.1f} min: {samples[-1][1]:.1f} MB", file=sys.stderr, flush=True)
    lines = "\n".join(f"| {minutes} | {memory_mb:.1f} |" for minutes, memory_mb in samples)
    return (
        f"\n#### Memory over a soak\n\n{_CLIENTS} clients, streams of {_LONG_TOKENS} and of "
        f"{_SHORT_TOKENS} tokens by turns; the last of each turn are hung up on.\n\n"
        f"| minutes | memory (MB) |\n| --- | --- |\n{lines}\n"
    )


def _bound_note(results: Results, servers: Sequence[Server]) -> str:
    bound = [
        f"{server.name} ({what})"
        for what in (_CHUNKS, _ANSWERS)
        for server in servers
        if server.name != DIRECT
        and results.median(what, server.name) >= _CLIENT_BOUND * results.median(what, DIRECT)
    ]
    found = f"It may have held back: {', '.join(bound)}." if bound else "It held back none of them."
    return (
        "direct: the clients at the engine itself, without a relay: the most that client and engine can do "
        f"on their core. {found} rigserve: a key with limits on all there is, metering and metrics."
    )


def _heading(cores: Cores) -> str:
    pinned = (
        "one core for a relay, one for clients and engine"
        if cores.rest is not None
        else "not pinned"
    )
    return (
        f"\n## {date.today()}: {processor()}\n\n"
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {pinned}; "
        f"litellm {LITELLM_VERSION}. Servers take turns in random order; medians of rounds; "
        "÷: rigserve's median over the other's.\n\n"
        f"Command: `python -m loadtest.benchmarks.gateway {shlex.join(sys.argv[1:])}`\n"
    )


if __name__ == "__main__":
    sys.exit(main())
