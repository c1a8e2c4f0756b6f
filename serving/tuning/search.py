"""The search: many settings measured briefly, the best of them longer (successive halving), the winner beside the default.

Time is what the measurements took, not the clock's: one that is taken up again goes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loadtest.statistics import student_t
from serving.config import ModelConfig
from serving.tuning.explorer import Explorer
from serving.tuning.goal import Failed, Goal, Measured, Result
from serving.tuning.space import Point, Space

Phase = Literal["explore", "halve", "compare"]
# Requests of each user, the share of the time that may be gone when a rung has ended, and how many of a rung go on.
_RUNGS = ((1, 0.4), (2, 0.5), (4, 0.55))
_SURVIVORS = 1 / 3
# The default and the best in turns: so often at least, and at most. Trials get longer only where there is time for as
# many pairs as it takes to do without the two furthest out.
_LEAST_PAIRS, _ROBUST_PAIRS, _MOST_PAIRS = 4, 8, 12
# Guesses that were tried already, until a space counts as known.
_MOST_STALE_GUESSES = 200
# What cannot fit takes no time.
_MOST_TRIALS = 500
# A failure, or a broken limit, teaches the explorer no more than so many times fewer tokens than the first: it is
# blamed on all keys that were changed, until others clear them.
_WORST = math.log(2)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point of a space, by the space's number, and the model that it is."""

    space: int
    point: Point
    model: ModelConfig

    @property
    def is_default(self) -> bool:
        """Whether it is what the search began with."""
        return self.space == 0 and not any(self.point)


@dataclass(frozen=True, slots=True)
class Trial:
    """One measurement of a candidate; it took ``seconds``, the start of its engine included."""

    candidate: Candidate
    phase: Phase
    rounds: int
    seconds: float
    result: Result


@dataclass(frozen=True, slots=True)
class Comparison:
    """The default and a contender, measured in turns: as many of one as of the other."""

    contender: Candidate
    pairs: tuple[tuple[Measured, Measured], ...]

    def ratio(self, of: Callable[[Measured], float]) -> tuple[float, float, float] | None:
        """How many times the default's a figure is, and the 95 % interval of it; None without two pairs.

        Student's t over the pairs' logarithms; from eight pairs on the one furthest out on either side counts as its
        neighbour does (Tukey and McLaughlin, 1963): one disturbed measurement decides nothing.
        """
        logs = np.sort([math.log(of(theirs) / of(ours)) for ours, theirs in self.pairs])
        pairs, aside = len(logs), int(len(logs) >= _ROBUST_PAIRS)
        if pairs < 2:
            return None
        kept = logs[aside : pairs - aside]
        mean = float(np.mean(kept))
        deviation = float(np.std(np.clip(logs, kept[0], kept[-1]), ddof=1))
        margin = student_t(len(kept) - 1) * deviation / (len(kept) / pairs * math.sqrt(pairs))
        return math.exp(mean), math.exp(mean - margin), math.exp(mean + margin)

    def is_surely_better(self, goal: Goal) -> bool:
        """Whether the interval of the score leaves no room for the default."""
        ratio = self.ratio(lambda measured: math.exp(goal.score(measured)))
        return ratio is not None and ratio[1] > 1


# What a candidate is like, after so many requests of each user, and in how many seconds.
Measure = Callable[[Candidate, int], tuple[Result, float]]


class Search:
    """Looks for the best candidate in some spaces; the base of the first is the default.

    ``fits`` says why a model cannot fit, before it is tried; None if it may. ``begun`` and ``ended`` hear of each trial.
    """

    def __init__(
        self,
        spaces: Sequence[Space],
        goal: Goal,
        budget_seconds: float,
        measure: Measure,
        *,
        fits: Callable[[ModelConfig], str | None],
        begun: Callable[[Phase, Candidate, int], None],
        ended: Callable[[Trial], None],
        seed: int = 0,
    ) -> None:
        self.trials: list[Trial] = []
        self._spaces, self._goal, self._budget = spaces, goal, budget_seconds
        self._measure, self._fits, self._begun, self._ended = measure, fits, begun, ended
        rng = np.random.default_rng(seed)
        self._explorers = [Explorer(space, rng) for space in spaces]
        self._seen: set[tuple[int, Point]] = set()
        self._first: float | None = None
        self._pairs: list[tuple[Measured, Measured]] = []
        self._contender: Candidate | None = None

    @property
    def spent_seconds(self) -> float:
        """What all trials took."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def default(self) -> Candidate:
        """What the search began with."""
        return Candidate(0, self._spaces[0].start, self._spaces[0].base)

    @property
    def comparison(self) -> Comparison | None:
        """The best candidate beside the default, as far as it has come."""
        if self._contender is None or not self._pairs:
            return None
        return Comparison(self._contender, tuple(self._pairs))

    def run(self) -> None:
        """Search to the end of the time. What was seen when it is interrupted is in ``trials``."""
        self._explore(*_RUNGS[0])
        for rounds, share in _RUNGS[1:]:
            self._halve(rounds, share)
        self._compare()

    def ranked(self) -> list[Candidate]:
        """All that worked, the best first: those measured for longer are before the others."""
        best: dict[tuple[int, Point], tuple[int, float, Candidate]] = {}
        for trial in self.trials:
            key = trial.candidate.space, trial.candidate.point
            if isinstance(trial.result, Failed):
                best.pop(key, None)
            elif trial.phase != "compare" and trial.rounds > best.get(key, (0,))[0]:
                score = self._goal.score(trial.result)
                best[key] = trial.rounds, score, trial.candidate
        found = sorted(best.values(), key=lambda each: each[:2], reverse=True)
        return [candidate for *_, candidate in found]

    def _explore(self, rounds: int, share: float) -> None:
        for number, space in enumerate(self._spaces):
            self._try(Candidate(number, space.start, space.base), "explore", rounds)
        for candidate in self._guesses():
            # Something is compared with the default, however little time there is.
            has_others = any(not trial.candidate.is_default for trial in self.trials)
            if has_others and self.spent_seconds >= share * self._budget:
                break
            self._try(candidate, "explore", rounds)
        for number, explorer in enumerate(self._explorers):
            likeliest = self._candidate(number, explorer.best())
            if explorer.knows_base and likeliest is not None:
                self._try(likeliest, "explore", rounds)

    def _guesses(self) -> Iterator[Candidate]:
        """New candidates, each of the space that is thought to have the best, until there are none.

        A space of which nothing worked is left alone, unless that is so of all.
        """
        stale = 0
        while stale < _MOST_STALE_GUESSES and len(self.trials) < _MOST_TRIALS:
            working = [n for n, explorer in enumerate(self._explorers) if explorer.knows_base]
            guesses = []
            for number in working or range(len(self._explorers)):
                point, score = self._explorers[number].guess()
                guesses.append((score, number, point))
            _, number, point = max(guesses)
            candidate = self._candidate(number, point)
            if candidate is None:
                stale += 1
            else:
                stale = 0
                yield candidate

    def _candidate(self, space: int, point: Point) -> Candidate | None:
        """A point that was not tried, and whose values go together; None otherwise."""
        if (space, point) in self._seen:
            return None
        try:
            return Candidate(space, point, self._spaces[space].model(point))
        except ValueError:
            self._seen.add((space, point))
            return None

    def _halve(self, rounds: int, share: float) -> None:
        """The best of the rung before once more, for longer, as far as there is time."""
        before = [each for each in self.ranked() if self._rounds_of(each) == rounds // 2]
        best = before[: max(math.ceil(len(before) * _SURVIVORS), 2)]
        for candidate in best:
            if self.spent_seconds >= share * self._budget:
                break
            self._try(candidate, "halve", rounds)

    def _rounds_of(self, candidate: Candidate) -> int:
        return max(trial.rounds for trial in self.trials if trial.candidate == candidate)

    def _compare(self) -> None:
        ranked = self.ranked()
        if self.default not in ranked:
            return
        for contender in ranked:
            if contender.is_default:
                continue
            self._contender, self._pairs = contender, []
            if self._compared_with(contender):
                return
        self._contender, self._pairs = None, []

    def _compared_with(self, contender: Candidate) -> bool:
        """Whether it held out: the default and it in turns, whoever began last time comes second."""
        rounds = self._rounds_that_fit(contender)
        while len(self._pairs) < _MOST_PAIRS:
            began = self.spent_seconds
            both = [self.default, contender]
            turns = both if len(self._pairs) % 2 == 0 else both[::-1]
            results = {each.is_default: self._try(each, "compare", rounds) for each in turns}
            ours, theirs = results[True], results[False]
            if isinstance(theirs, Failed) or isinstance(ours, Failed):
                return False
            self._pairs.append((ours, theirs))
            took = self.spent_seconds - began
            is_late = self.spent_seconds + took > self._budget
            if len(self._pairs) >= _LEAST_PAIRS and is_late:
                break
        return True

    def _rounds_that_fit(self, contender: Candidate) -> int:
        """The longest trials of which enough pairs fit into the rest of the time, or the shortest."""
        left = self._budget - self.spent_seconds
        of_both = [
            trial
            for trial in self.trials
            if trial.candidate in (self.default, contender) and trial.seconds
        ]
        seconds = max((trial.seconds / trial.rounds for trial in of_both), default=0.0)
        for rounds in (4, 2):
            if 2 * _ROBUST_PAIRS * rounds * seconds <= left:
                return rounds
        return 1

    def _try(self, candidate: Candidate, phase: Phase, rounds: int) -> Result:
        self._seen.add((candidate.space, candidate.point))
        self._begun(phase, candidate, rounds)
        reason = self._fits(candidate.model)
        if reason is None:
            result, seconds = self._measure(candidate, rounds)
        else:
            result, seconds = Failed(reason), 0.0
        self.trials.append(Trial(candidate, phase, rounds, seconds, result))
        self._ended(self.trials[-1])
        if phase == "explore":
            self._learn(candidate, result)
        return result

    def _learn(self, candidate: Candidate, result: Result) -> None:
        if isinstance(result, Measured):
            score = self._goal.score(result)
            self._first = score if self._first is None else self._first
            score = max(score, self._first - _WORST)
        elif self._first is None:
            return
        else:
            score = self._first - _WORST
        self._explorers[candidate.space].learn(candidate.point, score)
