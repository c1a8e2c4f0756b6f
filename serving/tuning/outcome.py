"""What a search has come to: which settings to take, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from serving.config import ModelConfig
from serving.planner.quality import note_of
from serving.tuning.bench import MOST_OF_OTHERS
from serving.tuning.goal import Failed, Goal, Measured
from serving.tuning.search import Candidate, Comparison, Search, Trial
from serving.tuning.space import identity


@dataclass(frozen=True, slots=True)
class Outcome:
    """The settings to take, ``best``, and why; None if nothing worked."""

    goal: Goal
    default: Candidate
    best: Candidate | None
    comparison: Comparison | None
    trials: tuple[Trial, ...]
    was_interrupted: bool

    @property
    def failed(self) -> tuple[Trial, ...]:
        """Trials that did not start, or did not answer."""
        return tuple(each for each in self.trials if isinstance(each.result, Failed))

    @property
    def reason(self) -> str:
        """A sentence, or two."""
        if self.best is None:
            return f"Nothing worked. The default: {self._reason_of(self.default)}"
        words = self._why(self.best)
        kept = [each for each in self._of(self.best) if self.goal.is_met(each)]
        if len(kept) < len(self._of(self.best)) / 2:
            words += (
                " It does not keep the SLO, and nothing that was tried does; this comes nearest."
            )
        return words

    def _why(self, best: Candidate) -> str:
        ratio = None if self.comparison is None else self.comparison.ratio(self.goal.figure)
        others = len({identity(each.candidate.model) for each in self.trials}) - 1
        if not best.is_default:
            if self.comparison is not None and ratio is not None:
                return (
                    f"Take it: {ratio[0]:.2f} times the default's {self.figure_name} "
                    f"(95 %: {ratio[1]:.2f} to {ratio[2]:.2f})."
                )
            if not self._of(self.default):
                return f"Take it: the default does not work here ({self._reason_of(self.default)})."
            return "The best so far, measured once; it was not compared with the default in turns."
        if self.comparison is None or ratio is None:
            return (
                "Nothing else worked."
                if others
                else "Nothing else was tried; give it a longer --budget."
            )
        which = "What else was tried" if others == 1 else f"The best of {others} others"
        is_open = (ratio[0] > 1) == self.goal.more_is_better
        return (
            f"Nothing beats the default surely. {which} has {ratio[0]:.2f} times its "
            f"{self.figure_name} (95 %: {ratio[1]:.2f} to {ratio[2]:.2f})."
            + (
                " A longer --budget goes on from here, and compares them more often."
                if is_open
                else ""
            )
        )

    @property
    def figure_name(self) -> str:
        """What is compared."""
        return {
            "throughput": "tokens per second",
            "latency": "latency",
            "cheapest": "price per token",
        }[self.goal.objective]

    def figures_of(self, candidate: Candidate) -> Measured | None:
        """The medians of its comparison, or else what its longest trial said; None if it never worked."""
        measured = self._of(candidate)
        if not measured:
            return None
        return Measured(
            **{
                name: median(getattr(each, name) for each in measured)
                for name in Measured.__slots__
                if name not in ("energy_source", "others_share")
            },
            energy_source=measured[-1].energy_source,
        )

    @property
    def disturbed(self) -> int:
        """How many measurements other programs disturbed, also when repeated."""
        return sum(
            isinstance(each.result, Measured) and (each.result.others_share or 0.0) > MOST_OF_OTHERS
            for each in self.trials
        )

    def _of(self, candidate: Candidate) -> list[Measured]:
        if self.comparison is not None and candidate in (self.default, self.comparison.contender):
            place = 0 if candidate == self.default else 1
            return [pair[place] for pair in self.comparison.pairs]
        worked = [
            (each.rounds, each.result)
            for each in self.trials
            if each.candidate == candidate and isinstance(each.result, Measured)
        ]
        longest = max((rounds for rounds, _ in worked), default=0)
        return [result for rounds, result in worked if rounds == longest]

    def _reason_of(self, candidate: Candidate) -> str:
        reasons = [
            each.result.reason
            for each in self.trials
            if each.candidate == candidate and isinstance(each.result, Failed)
        ]
        return reasons[-1] if reasons else "it was not tried"


def outcome_of(search: Search, goal: Goal, *, was_interrupted: bool) -> Outcome:
    """The contender if it is surely better, or the default does not work; before they were compared the best so far."""
    comparison, ranked = search.comparison, search.ranked()
    best = ranked[0] if ranked else None
    if comparison is not None and len(comparison.pairs) > 1:
        best = comparison.contender if comparison.is_surely_better(goal) else search.default
    return Outcome(goal, search.default, best, comparison, tuple(search.trials), was_interrupted)


def changes_of(default: ModelConfig, model: ModelConfig) -> Sequence[tuple[str, object, object]]:
    """The keys in which two configs of a model differ: (key, default's value, the model's)."""
    keys = sorted(model.model_fields_set | default.model_fields_set)
    pairs = ((key, getattr(default, key, None), getattr(model, key, None)) for key in keys)
    return [(key, before, now) for key, before, now in pairs if before != now]


def quality_of(model: ModelConfig) -> str:
    """What its quantization costs in quality, and that of its cache."""
    quantization = getattr(model, "quantization", None)
    words = "as its file has it" if quantization is None else note_of(quantization.upper())
    cache = getattr(model, "kv_type", None) or getattr(model, "kv_cache_dtype", "auto")
    if cache not in ("auto", "F16", "BF16", "bfloat16"):
        words += f"; cache in {cache}: loss not measured"
    return words
