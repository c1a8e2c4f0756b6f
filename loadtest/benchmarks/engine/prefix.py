"""Point 3: prompts that begin alike, and conversations, are not computed twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import aiohttp

from loadtest.benchmarks.engine.prompts import Corpus, Prompts
from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    RIGSERVE,
    Rig,
    Server,
    in_turns,
    servers,
)
from loadtest.benchmarks.engine.table import Figures, Results
from loadtest.benchmarks.streams import Reply
from loadtest.prompts import excerpt

_NAMES = (RIGSERVE, LLAMA_SERVER)
_SHARED_TOKENS, _OWN_TOKENS, _OUTPUT_TOKENS = 1000, 30, 16
_TOGETHER = 16
_CHAT_SLOTS, _CHATS, _TURNS = 4, 6, 4
_TURN_WORDS, _TURN_OUTPUT_TOKENS = 80, 32
_WANTED = {"at once: computed ÷ distinct": "≤ 1.15", "TTFT warm ÷ cold": "≤ 0.15",
           "computed ÷ new": "1: only what is new"}  # fmt: skip


def measure(rig: Rig, rounds: int) -> str:
    """Compare with llama-server; Markdown."""
    results = Results(_NAMES)
    with servers(rig, _NAMES) as running:
        corpus = Corpus.of(running[0])
        for number, server in in_turns(running, rounds):
            results.add(server.name, asyncio.run(_share(server, corpus.prompts(number))))
    with servers(replace(rig, slots=_CHAT_SLOTS), _NAMES) as running:
        for number, server in in_turns(running, rounds):
            results.add(server.name, asyncio.run(_chat(server, number)))
    return results.markdown(
        "Prefix reuse",
        _WANTED,
        f"Prompts share {_SHARED_TOKENS} tokens and have {_OWN_TOKENS} of their own. Computed: prompt_tokens less "
        f"cached_tokens, as the server says. Chats: {_CHATS} conversations in turns on {_CHAT_SLOTS} slots; new: the "
        f"prompt less the turn before with its answer. {rounds} rounds.",
    )


async def _share(server: Server, prompts: Prompts) -> Figures:
    def sharing(count: int) -> list[list[int]]:
        shared = prompts.new(_SHARED_TOKENS)
        return [shared + prompts.new(_OWN_TOKENS) for _ in range(count)]

    async with server.awake() as session:
        cold, warm = [await _complete(server, session, prompt) for prompt in sharing(2)]
        replies = await asyncio.gather(
            *(_complete(server, session, prompt) for prompt in sharing(_TOGETHER))
        )
    computed = sum(reply.computed_tokens for reply in replies)
    return {
        f"{_TOGETHER} at once: computed ÷ distinct": computed
        / (_SHARED_TOKENS + _TOGETHER * _OWN_TOKENS),
        "TTFT warm ÷ cold": warm.ttft_seconds / cold.ttft_seconds,
    }


async def _complete(server: Server, session: aiohttp.ClientSession, prompt: list[int]) -> Reply:
    stream = server.complete(prompt, max_tokens=_OUTPUT_TOKENS, **server.endless)
    await stream.run(session)
    return stream.reply()


async def _chat(server: Server, number: int) -> Figures:
    """Every conversation takes its turn before any takes its next: the worst order for few slots."""
    conversations: list[list[dict[str, str]]] = [[] for _ in range(_CHATS)]
    known = [0] * _CHATS  # tokens up to the end of the last answer
    figures = {}
    async with server.awake() as session:
        for turn in range(_TURNS):
            computed = new = 0
            for chat, messages in enumerate(conversations):
                question = excerpt((number * _CHATS + chat) * _TURNS + turn, _TURN_WORDS, seed=0)
                messages.append({"role": "user", "content": question})
                stream = server.chat(messages, max_tokens=_TURN_OUTPUT_TOKENS)
                await stream.run(session)
                reply = stream.reply()
                messages.append({"role": "assistant", "content": reply.text})
                computed += reply.computed_tokens
                new += reply.prompt_tokens - known[chat]
                known[chat] = reply.prompt_tokens + reply.completion_tokens
            if turn > 0:
                figures[f"chats, turn {turn + 1}: computed ÷ new"] = computed / new
    return figures
