"""Drafts from a second, smaller model with the same vocabulary."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from serving.llamacpp.prefixes import common_prefix
from serving.llamacpp.runtime import Context, Model, RuntimeFault, Sampler
from serving.llamacpp.sampling import SamplingParams

_log = logging.getLogger(__name__)

_BATCH_TOKENS = 512
# Further behind than this it is reading a prompt, which takes a step's time and more.
_CATCH_UP_TOKENS = 64


class DraftModel:
    """A loaded model with cells for one sequence, shared by all: the first tokens they have in common stay."""

    def __init__(
        self, path: Path, target: Model, *, context_length: int, threads: int, gpu_layers: int
    ) -> None:
        """Load the model; raises :class:`RuntimeFault`, also if its vocabulary is another."""
        self._model = Model(path, gpu_layers)
        try:
            _check_vocabulary(self._model, target, path)
            self._context = Context(
                self._model,
                slots=1,
                context_length=context_length,
                batch_tokens=_BATCH_TOKENS,
                threads=threads,
            )
        except RuntimeFault:
            self._model.close()
            raise
        self._sampler = Sampler(self._model, SamplingParams(temperature=0.0), context_length)
        self._tokens: list[int] = []
        self._is_broken = False

    def close(self) -> None:
        """Free all memory."""
        self._sampler.close()
        self._context.close()
        self._model.close()

    def evidence(self, tokens: Sequence[int], running: int) -> int:
        """Always the same for a sequence that runs alone; several are better computed together."""
        return int(running == 1 and not self._is_broken)

    def propose(self, tokens: Sequence[int], at_most: int) -> list[int]:
        """The likeliest tokens. Far behind it catches up, and proposes nothing this time."""
        room = self._context.context_length - len(tokens)
        known = min(common_prefix(self._tokens, list(tokens)), len(tokens) - 1)
        try:
            del self._tokens[known if self._context.truncate(0, known) else 0 :]
            drafts: list[int] = []
            for start in range(len(self._tokens), len(tokens), _BATCH_TOKENS):
                drafts = [self._read(tokens[start : start + _BATCH_TOKENS])]
            if len(tokens) - known > _CATCH_UP_TOKENS:
                return []
            while len(drafts) < min(at_most, room):
                drafts.append(self._read(drafts[-1:]))
            return drafts
        except RuntimeFault as fault:
            _log.error("the draft model is used no more: %s", fault)
            self._is_broken = True
            return []

    def _read(self, tokens: Sequence[int]) -> int:
        """Compute tokens that follow the known ones; returns what is likeliest to come next."""
        count, start = len(tokens), len(self._tokens)
        outputs = [False] * (count - 1) + [True]
        self._context.decode(tokens, range(start, start + count), [0] * count, outputs)
        self._tokens += tokens
        return self._sampler.sample(self._context, count - 1)


def _check_vocabulary(draft: Model, target: Model, path: Path) -> None:
    theirs, ours = ([m.token_text(t) for t in range(m.vocab_size)] for m in (draft, target))
    for token, (their, our) in enumerate(itertools.zip_longest(theirs, ours)):
        if their != our:
            raise RuntimeFault(
                f"the draft model {path} needs the vocabulary of the model it drafts for; "
                f"token {token} is {their!r} in one and {our!r} in the other"
            )
