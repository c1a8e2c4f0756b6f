"""Prompts of exact lengths in tokens, cut from the load test's text."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import loadtest
from loadtest.benchmarks.engine.servers import Server

_CORPUS = Path(loadtest.__file__).parent / "corpus.txt"


class Prompts:
    """Makes prompts no two of which begin alike: no prefix cache helps unless a prefix is shared on purpose."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._firsts = itertools.cycle(sorted(set(tokens)))
        self._random = random.Random(0)

    @classmethod
    def of(cls, server: Server) -> Prompts:
        """Prompts in the tokens of the model that a rigserve engine serves."""

        async def tokens() -> list[int]:
            async with server.awake() as session:
                return await server.tokenize(session, _CORPUS.read_text(encoding="utf-8"))

        return cls(asyncio.run(tokens()))

    def new(self, length: int) -> list[int]:
        """``length`` tokens of text after a first one that was not used lately."""
        start = self._random.randrange(len(self._tokens) - length)
        return [next(self._firsts), *self._tokens[start : start + length - 1]]
