"""Point 5: prompt lookup at one client, on work that copies and on work that does not."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Sequence

from loadtest.benchmarks.engine.servers import Rig, Server, in_turns, rigserve, warm
from loadtest.benchmarks.engine.table import Figures, Results
from loadtest.prompts import excerpt

_ON, _OFF = "prompt lookup", "without"
_OUTPUT_TOKENS = 160
_TEXT_WORDS = 120
# Words in a row that make a copy when they stand in the prompt, too.
_COPIED_WORDS = 4

Conversation = list[dict[str, str]]


def _conversation(*turns: str) -> Conversation:
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]


def _edit(number: int) -> Conversation:
    """A text is to be given again, with a change. A small model copies what it sees to have been copied before."""
    text = excerpt(number, _TEXT_WORDS, seed=1)
    return _conversation(
        f"Correct the spelling of this text, and answer with the whole text:\n\n{text}",
        text,
        "Thank you. Once more, with 'Alice' as 'Anna':",
    )


def _quote(number: int) -> Conversation:
    """A question that a document answers."""
    text = excerpt(number, _TEXT_WORDS, seed=1)
    question = "What does the document say? Answer with its own words"
    return _conversation(f"Document:\n\n{text}\n\n{question}.", text, f"{question}, once more.")


_TASKS = {
    "copying": (*(_edit(number) for number in range(1, 4)), *(_quote(n) for n in range(4, 7))),
    "others": (
        _conversation(
            "Describe a voyage across the ocean: the ship, its captain and crew, the weather."
        ),
        _conversation("Explain to a child how a bicycle stays upright."),
        _conversation("Write a letter to a friend about a day in the mountains."),
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


async def _work(server: Server, kind: str, tasks: Sequence[Conversation]) -> Figures:
    replies = []
    async with server.awake() as session:
        before = await server.statistics(session)
        for task in tasks:
            stream = server.chat(task, max_tokens=_OUTPUT_TOKENS)
            await stream.run(session)
            replies.append(stream.reply())
        after = await server.statistics(session)
    tokens = sum(reply.completion_tokens for reply in replies)
    figures = {
        "tok/s": tokens / sum(reply.chunks_at[-1] - reply.sent_at for reply in replies),
        "tok/s after the prompt": tokens / sum(sum(reply.gaps_seconds) for reply in replies),
    }
    copied = [_copied(task, reply.text) for task, reply in zip(tasks, replies, strict=True)]
    figures["of the answers copied, %"] = statistics.mean(copied) * 100
    drafted = after["drafted_tokens"] - before["drafted_tokens"]
    if drafted:
        accepted = after["accepted_tokens"] - before["accepted_tokens"]
        figures |= {"drafted tokens": drafted, "accepted of them, %": accepted / drafted * 100}
    return {f"{kind}: {what}": value for what, value in figures.items()}


def _copied(task: Conversation, answer: str) -> float:
    """The share of an answer's words that begin a copy of some words in a row."""
    known = set(_runs(" ".join(turn["content"] for turn in task)))
    runs = _runs(answer)
    return sum(run in known for run in runs) / max(len(runs), 1)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[at : at + _COPIED_WORDS]) for at in range(len(words) - _COPIED_WORDS + 1)]
