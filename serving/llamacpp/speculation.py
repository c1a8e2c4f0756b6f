"""Lossless speculative decoding: drafts of the next tokens, computed along with the last one.

A draft costs rows in a decode step, and saves a step for each token that proves right. Rows are almost
free on a GPU and dear on a CPU or in a large batch, so both sides are measured: seconds by the rows of
a step, and how often drafts were right. What is drafted is what pays at that moment.
"""

from __future__ import annotations

import bisect
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from serving.llamacpp.draft_model import DraftModel
from serving.llamacpp.runtime import Model, RuntimeFault

SpeculationKind = Literal["none", "prompt_lookup", "draft_model"]

# With the last token it makes a power of two, and so do its halves: CPU kernels compute rows in tiles, and
# the first few are the dearest.
_LONGEST_DRAFT = 31
# Shorter repetitions are chance. Of the latest occurrences the one that matches furthest back is taken.
_SHORTEST_MATCH, _LONGEST_MATCH, _OCCURRENCES = 3, 32, 8
# A draft is made when it is expected to gain this many times what it costs.
_MARGIN = 1.1
# How likely the first token of a kind of draft is right, until tried. Experience counts half after so
# many tokens: then it is tried again.
_HOPE, _HALF_LIFE_TOKENS = 0.9, 256
# Tokens that drafts may cost at first, for each token since, and at most.
_CREDIT_AT_START, _CREDIT_PER_TOKEN, _MOST_CREDIT = 8.0, 1 / 64, 32.0
# Rows beyond what was measured are hoped to cost this share of what a row costs there.
_HOPED_SHARE = 0.25
# Measurements are running means; steps whose rows differ by no more than a tenth are of one kind.
_WEIGHT_OF_NEWEST, _ALIKE = 0.02, 0.1
_VALID_STEPS, _MOST_VALID_STEPS = 128, 1024


class Proposer(Protocol):
    """What guesses the tokens that follow; one for each sequence."""

    def evidence(self, tokens: Sequence[int], running: int) -> int:
        """How much speaks for a guess, on the proposer's own scale; 0: there is none."""
        ...

    def propose(self, tokens: Sequence[int], at_most: int) -> list[int]:
        """The guess. Called right after :meth:`evidence`, if at all."""
        ...


class PromptLookup:
    """Guesses that what followed the last few tokens before follows them again.

    All places with the same few tokens are chained, the latest first, as in LZ77.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = [-1] * _SHORTEST_MATCH
        self._source = -1

    def evidence(self, tokens: Sequence[int], running: int) -> int:
        """The binary magnitude of the number of last tokens that were there before."""
        for end in range(len(self._earlier), len(tokens)):
            key = tuple(tokens[end - _SHORTEST_MATCH : end])
            self._earlier.append(self._latest.get(key, -1))
            self._latest[key] = end
        source = self._latest.get(tuple(tokens[-_SHORTEST_MATCH:]), -1)
        longest = 0
        for _ in range(_OCCURRENCES):
            if source < 0 or longest == _LONGEST_MATCH:
                break
            length = _match_length(tokens, source)
            if length > longest:
                longest, self._source = length, source
            source = self._earlier[source]
        return longest.bit_length()

    def propose(self, tokens: Sequence[int], at_most: int) -> list[int]:
        """What followed; where that reaches the end it goes on with the draft itself (repetition)."""
        drafts: list[int] = []
        for position in range(self._source, self._source + at_most):
            beyond = position - len(tokens)
            drafts.append(tokens[position] if beyond < 0 else drafts[beyond])
        return drafts


def _match_length(tokens: Sequence[int], end: int) -> int:
    """How many of the last tokens equal those before ``end``."""
    last = len(tokens)
    most = min(end, _LONGEST_MATCH)
    return next((n for n in range(most) if tokens[end - 1 - n] != tokens[last - 1 - n]), most)


@dataclass(slots=True)
class _Steps:
    """Steps of nearly as many rows: their means, the newest count most."""

    rows: float
    seconds: float
    count: int
    last: int

    @property
    def valid_steps(self) -> int:
        """How long they are believed: one slow step of a busy machine proves little."""
        return min(self.count * _VALID_STEPS, _MOST_VALID_STEPS)


class StepCost:
    """How long decode steps take, by their number of rows."""

    def __init__(self) -> None:
        self._measured: list[_Steps] = []
        self._count = 0

    def observe(self, rows: int, seconds: float) -> None:
        """Take a step in, and forget what was measured too long ago to be true."""
        self._count += 1
        # The smallest step is the yardstick for all others, and rare while drafts are good: it stays.
        self._measured[1:] = [m for m in self._measured[1:] if self._count - m.last < m.valid_steps]
        alike = min(self._measured, key=lambda m: abs(m.rows - rows), default=None)
        if alike is not None and abs(alike.rows - rows) <= _ALIKE * rows:
            alike.count, alike.last = alike.count + 1, self._count
            weight = max(_WEIGHT_OF_NEWEST, 1 / alike.count)
            alike.rows += weight * (rows - alike.rows)
            alike.seconds += weight * (seconds - alike.seconds)
        else:
            new = _Steps(rows, seconds, 1, self._count)
            self._measured = sorted([*self._measured, new], key=lambda m: m.rows)

    @property
    def most_rows(self) -> float:
        """Of steps beyond this nothing is known."""
        return self._measured[-1].rows if self._measured else 0.0

    def seconds(self, rows: float) -> float:
        """The expected duration: linear between what was measured, hopeful beyond; 0 if nothing was."""
        if not self._measured:
            return 0.0
        largest = self._measured[-1]
        if rows >= largest.rows or len(self._measured) == 1:
            return largest.seconds * (1 + _HOPED_SHARE * (rows / largest.rows - 1))
        high = max(bisect.bisect(self._measured, rows, key=lambda m: m.rows), 1)
        below, above = self._measured[high - 1 : high + 1]
        slope = max(above.seconds - below.seconds, 0.0) / (above.rows - below.rows)
        return max(below.seconds + slope * (rows - below.rows), 0.0)


@dataclass(slots=True)
class _Experience:
    """How drafts of one kind fared; old drafts fade as tokens go by."""

    right: float = 0.0
    tried: float = 0.0
    at_token: int = 0

    def likelihood(self, now: int) -> float:
        """How likely a drafted token is right if those before it are."""
        weight = math.exp2((self.at_token - now) / _HALF_LIFE_TOKENS)
        return (self.right * weight + _HOPE) / (self.tried * weight + 1)

    def add(self, proposed: int, accepted: int, now: int) -> None:
        weight = math.exp2((self.at_token - now) / _HALF_LIFE_TOKENS)
        self.right = self.right * weight + accepted
        self.tried = self.tried * weight + accepted + (accepted < proposed)
        self.at_token = now


class Speculation:
    """Decides when and how far to draft, for all sequences of an engine.

    Drafts may cost a small share of the tokens that the time would have brought otherwise; that is kept
    account of as measured, so work that cannot be guessed is hardly slowed down.
    """

    def __init__(
        self, proposer: Callable[[], Proposer], close: Callable[[], None] = lambda: None
    ) -> None:
        """``proposer`` makes one for a sequence, ``close`` ends what they share."""
        self._proposer = proposer
        self._close = close
        self._cost = StepCost()
        self._experience: defaultdict[int, _Experience] = defaultdict(_Experience)
        self._seconds_per_draft = 0.0
        self._credit = _CREDIT_AT_START
        self._promised = 0.0
        self._tokens = 0
        self._drafted = self._accepted = 0
        self._drafting_seconds = 0.0

    def close(self) -> None:
        """Free what drafts."""
        self._close()

    def of(self, tokens: Sequence[int]) -> Speculator:
        """What drafts for a new sequence."""
        return Speculator(self, self._proposer())

    def length(self, kind: int, running: int, at_most: int) -> int:
        """How many tokens of a kind to draft for one of ``running`` sequences; 0: it does not pay."""
        likelihood = self._experience[kind].likelihood(self._tokens)
        plain = self._cost.seconds(running)
        best, best_gain, best_price = 0, 0.0, 0.0
        length = at_most
        while length and plain:
            right = sum(likelihood**n for n in range(1, length + 1))
            extra = self._cost.seconds(running + length) - plain + length * self._seconds_per_draft
            price = running * extra / plain
            gain = right - _MARGIN * price
            if gain > best_gain and price < self._credit - self._promised:
                best, best_gain, best_price = length, gain, price
            length //= 2
        # One draft a step is enough to find out what larger steps cost.
        is_trial = running + best > self._cost.most_rows
        self._promised += self._credit if is_trial else best_price
        return best

    def drafted(self, count: int, seconds: float) -> None:
        """Tell how long a draft took to make."""
        self._seconds_per_draft += _WEIGHT_OF_NEWEST * (seconds / count - self._seconds_per_draft)
        self._drafting_seconds += seconds

    def record(self, kind: int, proposed: int, accepted: int) -> None:
        """Tell how a draft fared in the current step."""
        self._experience[kind].add(proposed, accepted, self._tokens)
        self._drafted += proposed
        self._accepted += accepted

    def observe(self, rows: int, seconds: float) -> None:
        """Tell how long the current decode step took, drafts' rows included."""
        running = rows - self._drafted
        plain = self._cost.seconds(running)
        if self._drafted and plain:
            spent = seconds + self._drafting_seconds - plain
            self._credit += self._accepted - running * spent / plain
        self._tokens += running + self._accepted
        self._credit += running * _CREDIT_PER_TOKEN
        self._credit = min(self._credit, _MOST_CREDIT)
        self._cost.observe(rows, seconds)
        self._drafted = self._accepted = 0
        self._drafting_seconds = self._promised = 0.0


class Speculator:
    """Drafts for one sequence."""

    def __init__(self, speculation: Speculation, proposer: Proposer) -> None:
        self._speculation = speculation
        self._proposer = proposer
        self._kind = 0

    def draft(self, tokens: Sequence[int], running: int, at_most: int) -> list[int]:
        """Tokens that may follow, ``at_most`` so many, in a step of ``running`` sequences."""
        self._kind = self._proposer.evidence(tokens, running) if at_most > 0 else 0
        if not self._kind:
            return []
        length = self._speculation.length(self._kind, running, min(_LONGEST_DRAFT, at_most))
        if not length:
            return []
        started = time.perf_counter()
        drafts = self._proposer.propose(tokens, length)
        if drafts:
            self._speculation.drafted(len(drafts), time.perf_counter() - started)
        return drafts

    def record(self, proposed: int, accepted: int) -> None:
        """Tell how many of the drafts went into the step, and how many were right."""
        if proposed:
            self._speculation.record(self._kind, proposed, accepted)


def speculation_of(
    kind: SpeculationKind,
    model: Model,
    draft_model_path: Path | None,
    *,
    context_length: int,
    threads: int,
    gpu_layers: int,
) -> Speculation | None:
    """What the options ask for; raises ``RuntimeFault``."""
    if kind != "none" and model.has_state:
        raise RuntimeFault(
            f"speculation {kind!r} is not for recurrent models: their state cannot be taken back; "
            "set it to 'none'"
        )
    if kind == "prompt_lookup":
        return Speculation(PromptLookup)
    if kind == "draft_model":
        if draft_model_path is None:
            raise RuntimeFault("speculation 'draft_model' needs a draft model's file")
        draft_model = DraftModel(
            draft_model_path,
            model,
            context_length=context_length,
            threads=threads,
            gpu_layers=gpu_layers,
        )
        return Speculation(lambda: draft_model, draft_model.close)
    return None
