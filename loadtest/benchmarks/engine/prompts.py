"""Prompts of exact lengths in tokens, cut from the load test's text."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from loadtest.benchmarks.engine.servers import Server
from loadtest.prompts import CORPUS_PATH


class Prompts:
    """Makes prompts no two of which begin alike: no cache helps unless a prefix is shared on purpose."""

    def __init__(self, tokens: list[int], seed: int) -> None:
        self._tokens = tokens
        self._random = random.Random(seed)
        self._firsts = sorted(set(tokens))
        self._random.shuffle(self._firsts)

    def new(self, length: int) -> list[int]:
        """A token not yet used as a first one, and ``length`` less one tokens of text."""
        start = self._random.randrange(len(self._tokens) - length)
        return [self._firsts.pop(), *self._tokens[start : start + length - 1]]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text in the tokens of the model that is measured."""

    tokens: list[int]

    @classmethod
    def of(cls, server: Server) -> Corpus:
        """As a rigserve engine tokenizes it."""

        async def tokens() -> list[int]:
            async with server.awake() as session:
                return await server.tokenize(session, CORPUS_PATH.read_text(encoding="utf-8"))

        return cls(asyncio.run(tokens()))

    def prompts(self, number: int) -> Prompts:
        """The prompts of a round: the same for each server."""
        return Prompts(self.tokens, number)
