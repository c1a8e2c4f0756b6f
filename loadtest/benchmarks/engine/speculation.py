"""Point 5: prompt lookup at one client, on work that copies and on work that does not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from loadtest.benchmarks.engine.servers import Rig, Server, in_turns, rigserve, warm
from loadtest.benchmarks.engine.table import Figures, Results
from loadtest.prompts import excerpt

_ON, _OFF = "prompt lookup", "without"
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
_TASKS = {
    "copying": (
        "Correct the spelling of this text, and answer with the whole text:\n\n"
        + excerpt(1, _TEXT_WORDS, seed=1),
        f"Document:\n\n{excerpt(2, _TEXT_WORDS, seed=1)}\n\n"
        "Answer from the document, in its own words: what does it say from its beginning on?",
        f"Rename 'result' to 'amount' and answer with the whole function:\n\n```python\n{_CODE}```",
    ),
    "others": (
        "Describe a voyage across the ocean: the ship, its captain and crew, the weather.",
        "Explain to a child how a bicycle stays upright.",
        "Write a letter to a friend about a day in the mountains.",
    ),
}
_WANTED = {"copying: tok/s": "≥ 1.30", "others: tok/s": "≥ 0.97"}


def measure(rig: Rig, rounds: int) -> str:
    """Compare the engine with itself; Markdown."""
    results = Results([_ON, _OFF])
    options = ("--speculation", "prompt_lookup")
    with rigserve(rig, *options, name=_ON) as on, rigserve(rig, name=_OFF) as off:
        warm([on, off])
        for _, server in in_turns([on, off], rounds):
            for kind, tasks in _TASKS.items():
                results.add(server.name, asyncio.run(_work(server, kind, tasks)))
    return results.markdown(
        "Speculation, one client",
        _WANTED,
        f"Greedy chats, up to {_OUTPUT_TOKENS} tokens an answer, {' and '.join(str(len(each)) for each in _TASKS.values())} "
        f"tasks, {rounds} rounds; tokens over the whole time, and over the time from the first token on.",
    )


async def _work(server: Server, kind: str, tasks: Sequence[str]) -> Figures:
    replies = []
    async with server.awake() as session:
        before = await server.statistics(session)
        for task in tasks:
            stream = server.chat([{"role": "user", "content": task}], max_tokens=_OUTPUT_TOKENS)
            await stream.run(session)
            replies.append(stream.reply())
        after = await server.statistics(session)
    tokens = sum(reply.completion_tokens for reply in replies)
    figures = {
        "tok/s": tokens / sum(reply.chunks_at[-1] - reply.sent_at for reply in replies),
        "tok/s after the prompt": tokens / sum(sum(reply.gaps_seconds) for reply in replies),
    }
    drafted = after["drafted_tokens"] - before["drafted_tokens"]
    if drafted:
        accepted = after["accepted_tokens"] - before["accepted_tokens"]
        figures |= {"drafted tokens": drafted, "accepted of them, %": accepted / drafted * 100}
    return {f"{kind}: {what}": value for what, value in figures.items()}
