"""Prompts of a wanted length: excerpts of Alice in Wonderland (public domain), no two beginning alike."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

CORPUS_PATH = Path(__file__).parent / "corpus.txt"

_WORDS = CORPUS_PATH.read_text(encoding="utf-8").split()


def excerpt(number: int, words: int, seed: int) -> str:
    """``words`` words from a place in the text chosen by ``seed`` and ``number``.

    The number comes first, so that a server's prefix cache finds nothing of one prompt in another.
    """
    start = random.Random(f"{seed}/{number}").randrange(len(_WORDS))
    text = itertools.islice(itertools.cycle(_WORDS), start, start + words)
    return " ".join((f"{number}:", *text))


class Calibration:
    """How many words make a prompt of so many tokens, learnt from two prompts the server has counted."""

    def __init__(self, short: tuple[int, int], long: tuple[int, int]) -> None:
        """``short`` and ``long`` are (words, prompt tokens)."""
        self._tokens_per_word = max((long[1] - short[1]) / (long[0] - short[0]), 0.1)
        self._overhead_tokens = short[1] - short[0] * self._tokens_per_word

    def words_for(self, tokens: int) -> int:
        """Words of an excerpt that should give ``tokens`` prompt tokens; at least one."""
        return max(round((tokens - self._overhead_tokens) / self._tokens_per_word), 1)
