"""Real text by the token: where it comes from, and how many words of it a server counts as so many tokens."""

from __future__ import annotations

import bisect
import re
import sysconfig
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from loadtest.client import Client, ServerError
from loadtest.prompts import CORPUS_PATH

_STRIDE_WORDS = 250
_CODE_WORDS = 8000
# Before anything is known: English prose, and Python, in tokens a word of common vocabularies.
_TOKENS_PER_WORD = {"prose": 1.4, "code": 3.0}
# What a server counts moves the estimate by this much, until it has said so a hundred times.
_LEARNT_AT_MOST = 100
# Who counts fewer does not count words of these texts; believing it, prompts would grow without end.
_LEAST_TOKENS_PER_WORD = 0.8


@cache
def words_of(kind: str) -> tuple[str, ...]:
    """The words of a text, each with the white space that follows it."""
    if kind == "prose":
        text = CORPUS_PATH.read_text(encoding="utf-8")
    else:
        library = Path(sysconfig.get_path("stdlib"))
        files = ("argparse.py", "dataclasses.py", "statistics.py", "textwrap.py", "heapq.py")
        text = "\n".join((library / name).read_text(encoding="utf-8") for name in files)
    return tuple(re.findall(r"\S+\s*", text)[:_CODE_WORDS])


def excerpt(kind: str, start: int, words: int) -> str:
    """So many words from a place in the text on; at its end it begins again."""
    text = words_of(kind)
    begin = start % len(text)
    # By slices: walking to a place in the text would cost more than sending it.
    parts = [*text[begin : begin + words]]
    while len(parts) < words:
        parts += text[: words - len(parts)]
    return "".join(parts)


@dataclass
class Gauge:
    """How many words make so many tokens.

    With ``counted``, the server's own counts of every 250 words, it is exact to a few tokens. Without,
    it is an estimate, corrected by what the server's ``usage`` says of each prompt. ``overhead_tokens`` are
    those that a chat template adds to one message.
    """

    kind: str
    tokens_per_word: float
    overhead_tokens: float = 0.0
    counted: list[int] = field(default_factory=list)
    _learnt: int = 0

    @staticmethod
    def of(kind: str) -> Gauge:
        """A gauge that knows nothing of the server."""
        return Gauge(kind, _TOKENS_PER_WORD[kind])

    def measure(self, client: Client, model: str) -> bool:
        """Have the server count the text, if it has /tokenize (rigserve, vLLM, llama-server); whether it did."""
        words = words_of(self.kind)
        total = 0
        counted = [0]
        for start in range(0, len(words), _STRIDE_WORDS):
            count = _count(client, model, "".join(words[start : start + _STRIDE_WORDS]))
            if not count:
                return False
            total += count
            counted.append(total)
        self.counted = counted
        self.tokens_per_word = total / len(words)
        return True

    def calibrate(self, few: tuple[int, int], many: tuple[int, int]) -> None:
        """Learn from two prompts, (words, tokens as the server counted)."""
        if not self.counted:
            seen = (many[1] - few[1]) / (many[0] - few[0])
            self.tokens_per_word = max(seen, _LEAST_TOKENS_PER_WORD)
        self.overhead_tokens = max(few[1] - few[0] * self.tokens_per_word, 0.0)

    def learn(self, words: int, tokens: int) -> None:
        """Correct the estimate by one prompt of the server's ``usage``."""
        if self.counted or words < 1 or tokens <= self.overhead_tokens:
            return
        self._learnt = min(self._learnt + 1, _LEARNT_AT_MOST)
        seen = max((tokens - self.overhead_tokens) / words, _LEAST_TOKENS_PER_WORD)
        self.tokens_per_word += (seen - self.tokens_per_word) / (self._learnt + 1)

    def words_for(self, tokens: float, start: int) -> int:
        """Words from a place in the text on that should be ``tokens`` tokens; at least one."""
        if not self.counted:
            return max(round(tokens / self.tokens_per_word), 1)
        size = len(words_of(self.kind))
        whole, tokens = divmod(max(tokens, 1), self.counted[-1])
        begin = start % size
        target = self._tokens_before(begin) + tokens
        end = self._word_at(target)
        if target > self.counted[-1]:
            end = size + self._word_at(target - self.counted[-1])
        return max(round(end - begin + whole * size), 1)

    def _tokens_before(self, word: float) -> float:
        stride, rest = divmod(word, _STRIDE_WORDS)
        low = self.counted[int(stride)]
        high = self.counted[min(int(stride) + 1, len(self.counted) - 1)]
        return low + (high - low) * rest / self._stride_words(int(stride))

    def _word_at(self, tokens: float) -> float:
        stride = min(bisect.bisect_right(self.counted, tokens), len(self.counted) - 1) - 1
        low, high = self.counted[stride], self.counted[stride + 1]
        return stride * _STRIDE_WORDS + (tokens - low) / (high - low) * self._stride_words(stride)

    def _stride_words(self, stride: int) -> int:
        return min(_STRIDE_WORDS, max(len(words_of(self.kind)) - stride * _STRIDE_WORDS, 1))


def _count(client: Client, model: str, text: str) -> int:
    """Tokens of a text; 0 if the server does not say."""
    for body in (
        {"model": model, "prompt": text, "add_special_tokens": False},
        {"content": text},  # llama-server
    ):
        try:
            answer = client.post("/tokenize", body, below_base=False)
        except ServerError:
            continue
        tokens = answer.get("tokens")
        count = answer.get("count") or (len(tokens) if isinstance(tokens, list) else 0)
        if isinstance(count, int) and count > 0:
            return count
    return 0
