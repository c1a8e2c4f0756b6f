"""Drafts from a second, smaller model with the same vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from serving.llamacpp.runtime import Context, Model, RuntimeFault, Sampler
from serving.llamacpp.sampling import SamplingParams
from serving.llamacpp.slots import common_prefix

_log = logging.getLogger(__name__)

_BATCH_TOKENS = 512
# Further behind than this it is reading a prompt, which takes a step's time and more.
_CATCH_UP_TOKENS = 64


class DraftModel:
    """A loaded model with cells for one sequence, shared by all: the first tokens they have in common stay."""

    def __init__(
        self, path: Path, target: Model, *, context_length: int, threads: int, gpu_layers: int
    ) -> None:
        """Load the model; raises :class:`RuntimeFault`, also if its vocabulary is not the target's."""
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
            self._keep(known)
            behind = len(tokens) - len(self._tokens)
            for start in range(len(self._tokens), len(tokens), _BATCH_TOKENS):
                self._read(tokens[start : start + _BATCH_TOKENS])
            if behind > _CATCH_UP_TOKENS:
                return []
            drafts = [self._sampler.sample(self._context, -1)]
            while len(drafts) < min(at_most, room):
                self._read(drafts[-1:])
                drafts.append(self._sampler.sample(self._context, -1))
            return drafts
        except RuntimeFault as fault:
            _log.error("the draft model is used no more: %s", fault)
            self._is_broken = True
            return []

    def _keep(self, length: int) -> None:
        if length < len(self._tokens):
            kept = length if self._context.truncate(0, length) else 0
            del self._tokens[kept:]

    def _read(self, tokens: Sequence[int]) -> None:
        """Compute tokens that follow the known ones; the last one's logits can be sampled."""
        count, start = len(tokens), len(self._tokens)
        outputs = [False] * (count - 1) + [True]
        self._context.decode(tokens, range(start, start + count), [0] * count, outputs)
        self._tokens += tokens


def _check_vocabulary(draft: Model, target: Model, path: Path) -> None:
    sizes = draft.vocab_size, target.vocab_size
    if sizes[0] != sizes[1]:
        raise RuntimeFault(
            f"the draft model {path} has {sizes[0]} tokens, the model {sizes[1]}: "
            "a draft model needs the same vocabulary"
        )
    for token in range(sizes[0]):
        if draft.token_text(token) != target.token_text(token):
            raise RuntimeFault(
                f"token {token} is {draft.token_text(token)!r} in the draft model {path} and "
                f"{target.token_text(token)!r} in the model: a draft model needs the same vocabulary"
            )
