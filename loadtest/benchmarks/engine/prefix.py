"""Point 3: prompts that begin alike, and conversations, are not computed twice."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import aiohttp

from loadtest.benchmarks.engine.prompts import Prompts
from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    RIGSERVE,
    Rig,
    Server,
    rotated,
    servers,
)
from loadtest.benchmarks.engine.table import section
from loadtest.benchmarks.streams import Reply
from loadtest.prompts import excerpt

_NAMES = (RIGSERVE, LLAMA_SERVER)
_SHARED_TOKENS, _OWN_TOKENS, _OUTPUT_TOKENS = 1000, 30, 16
_TOGETHER = 16
_CHAT_SLOTS, _CHATS, _TURNS = 4, 6, 4
_TURN_WORDS, _TURN_OUTPUT_TOKENS = 80, 32
_SHARING = f"{_TOGETHER} at once sharing {_SHARED_TOKENS} tokens: computed ÷ distinct"
_WARM = f"TTFT warm ÷ cold, {_SHARED_TOKENS} shared tokens"
_WANTED = {_SHARING: "≤ 1.15", _WARM: "≤ 0.15"}

Figures = dict[tuple[str, str], list[float]]  # by what was measured, and whose it is


def measure(rig: Rig, rounds: int) -> str:
    """Compare with llama-server; Markdown."""
    figures: Figures = defaultdict(list)
    with servers(rig, _NAMES) as running:
        prompts = Prompts.of(running[0])
        for number in range(rounds):
            together, alone = (_sharing(prompts, count) for count in (_TOGETHER, 2))
            for server in rotated(running, number):
                asyncio.run(_share(server, together, alone, figures))
    numbers = itertools.count()
    with servers(replace(rig, slots=_CHAT_SLOTS), _NAMES) as running:
        for number in range(rounds):
            chats = [next(numbers) for _ in range(_CHATS)]
            for server in rotated(running, number):
                asyncio.run(_chat(server, chats, figures))
    return section(
        "Prefix reuse",
        ["", *_NAMES, "wanted"],
        [
            [what, *(f"{statistics.median(figures[what, name]):.3f}" for name in _NAMES),
             _WANTED.get(what, "near 1")]
            for what in dict.fromkeys(what for what, _ in figures)
        ],
        f"Computed: prompt_tokens less cached_tokens, as the server says. At once: {_OWN_TOKENS} tokens of its own for "
        f"each request. Chats: {_CHATS} conversations in turns on {_CHAT_SLOTS} slots; new: the prompt, less the turn "
        f"before with its answer. {rounds} rounds.",
    )  # fmt: skip


def _sharing(prompts: Prompts, count: int) -> list[list[int]]:
    shared = prompts.new(_SHARED_TOKENS)
    return [shared + prompts.new(_OWN_TOKENS) for _ in range(count)]


async def _share(
    server: Server,
    together: Sequence[list[int]],
    alone: Sequence[list[int]],
    figures: Figures,
) -> None:
    async with server.awake() as session:
        cold, warm = [await _complete(server, session, prompt) for prompt in alone]
        replies = await asyncio.gather(*(_complete(server, session, each) for each in together))
    computed = sum(reply.computed_tokens for reply in replies)
    figures[_SHARING, server.name].append(computed / (_SHARED_TOKENS + len(together) * _OWN_TOKENS))
    figures[_WARM, server.name].append(warm.ttft_seconds / cold.ttft_seconds)


async def _complete(server: Server, session: aiohttp.ClientSession, prompt: list[int]) -> Reply:
    stream = server.complete(prompt, max_tokens=_OUTPUT_TOKENS, **server.endless)
    await stream.run(session)
    return stream.reply()


async def _chat(server: Server, chats: Sequence[int], figures: Figures) -> None:
    """Every conversation takes its turn before any takes its next: the worst order for few slots."""
    conversations: list[list[dict[str, str]]] = [[] for _ in chats]
    known = [0] * len(chats)  # tokens up to the end of the last answer
    async with server.awake() as session:
        for turn in range(_TURNS):
            computed = new = 0
            for index, number in enumerate(chats):
                messages = conversations[index]
                question = excerpt(number * _TURNS + turn, _TURN_WORDS, seed=0)
                messages.append({"role": "user", "content": question})
                stream = server.chat(messages, max_tokens=_TURN_OUTPUT_TOKENS)
                await stream.run(session)
                reply = stream.reply()
                messages.append({"role": "assistant", "content": reply.text})
                computed += reply.computed_tokens
                new += reply.prompt_tokens - known[index]
                known[index] = reply.prompt_tokens + reply.completion_tokens
            if turn > 0:
                what = f"chats, turn {turn + 1}: computed ÷ new"
                figures[what, server.name].append(computed / new)
