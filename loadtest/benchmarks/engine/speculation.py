"""Point 5: prompt lookup at one client, on work that copies and on work that does not."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.benchmarks.engine.servers import RIGSERVE, Rig, Server, rigserve, rotated
from loadtest.benchmarks.engine.table import ratio, section
from loadtest.prompts import excerpt

_ON, _OFF = "prompt lookup", RIGSERVE
_OUTPUT_TOKENS = 160
_TEXT_WORDS = 120
_CODE = '''def total(prices, tax):
    """The sum of prices, with tax."""
    result = 0
    for price in prices:
        if price < 0:
            raise ValueError("a price is negative")
        result = result + price
    result = result + result * tax
    return result
'''
_COPYING = (
    "Correct the spelling of this text, and answer with the whole text:\n\n"
    + excerpt(1, _TEXT_WORDS, seed=1),
    "Document:\n\n"
    + excerpt(2, _TEXT_WORDS, seed=1)
    + "\n\nAnswer from the document, in its own words: what does it say from its beginning on?",
    f"Rename 'result' to 'amount' and answer with the whole function:\n\n```python\n{_CODE}```",
)
_OTHERS = (
    "Describe a voyage across the ocean: the ship, its captain and crew, the weather they met.",
    "Explain to a child how a bicycle stays upright.",
    "Write a letter to a friend about a day in the mountains.",
)
_KINDS = {"copying": (_COPYING, "≥ 1.30"), "others": (_OTHERS, "≥ 0.97")}


@dataclass(frozen=True, slots=True)
class Run:
    """All tasks of a kind, one after the other."""

    tokens: int
    seconds: float
    decode_seconds: float
    drafted: int
    accepted: int
    texts: tuple[str, ...]


def measure(rig: Rig, rounds: int) -> str:
    """Compare the engine with itself; Markdown."""
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    with (
        rigserve(rig, name=_OFF) as off,
        rigserve(rig, "--speculation", "prompt_lookup", name=_ON) as on,
    ):
        for server in (off, on):
            os.killpg(server.process_group, signal.SIGSTOP)
        for number in range(rounds):
            for kind, (tasks, _) in _KINDS.items():
                for server in rotated([off, on], number):
                    runs[kind, server.name].append(asyncio.run(_run(server, tasks)))
    return section(
        "Speculation (prompt lookup), one client",
        ["tasks", "off tok/s", "on tok/s", "on ÷ off", "wanted", "without prompts",
         "accepted of drafted", "same text"],
        [_row(kind, runs[kind, _OFF], runs[kind, _ON]) for kind in _KINDS],
        f"Greedy, up to {_OUTPUT_TOKENS} tokens an answer, {len(_COPYING)} and {len(_OTHERS)} tasks, {rounds} rounds; "
        "tokens over the whole time, and over the time after the first token ('without prompts').",
    )  # fmt: skip


async def _run(server: Server, tasks: Sequence[str]) -> Run:
    async with server.awake() as session:
        before = await server.statistics(session)
        replies = []
        for task in tasks:
            stream = server.chat([{"role": "user", "content": task}], max_tokens=_OUTPUT_TOKENS)
            await stream.run(session)
            replies.append(stream.reply())
        after = await server.statistics(session)
    return Run(
        sum(reply.completion_tokens for reply in replies),
        sum(reply.chunks_at[-1] - reply.sent_at for reply in replies),
        sum(reply.chunks_at[-1] - reply.chunks_at[0] for reply in replies),
        after["drafted_tokens"] - before["drafted_tokens"],
        after["accepted_tokens"] - before["accepted_tokens"],
        tuple(reply.text for reply in replies),
    )


def _row(kind: str, off: Sequence[Run], on: Sequence[Run]) -> list[str]:
    def speed(runs: Sequence[Run]) -> float:
        return statistics.median(run.tokens / run.seconds for run in runs)

    def decode_speed(runs: Sequence[Run]) -> float:
        return statistics.median(run.tokens / run.decode_seconds for run in runs)

    drafted = sum(run.drafted for run in on)
    accepted = sum(run.accepted for run in on)
    same = sum(one == other for one, other in zip(on[0].texts, off[0].texts, strict=True))
    return [
        kind,
        f"{speed(off):.1f}",
        f"{speed(on):.1f}",
        ratio(speed(on), speed(off)),
        _KINDS[kind][1],
        ratio(decode_speed(on), decode_speed(off)),
        f"{accepted / drafted:.0%} of {drafted}" if drafted else "nothing drafted",
        f"{same} of {len(on[0].texts)}",
    ]
