"""The search for settings, over made-up machines whose best settings are known."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from serving.config import LlamaCppModel, LlamaServerModel, ModelConfig, VllmModel, load_config
from serving.tuning.bench import Work
from serving.tuning.config_file import config_text
from serving.tuning.goal import Failed, Goal, Measured, Result
from serving.tuning.journal import Journal
from serving.tuning.outcome import Outcome, outcome_of
from serving.tuning.page import page
from serving.tuning.search import Candidate, Search, Trial
from serving.tuning.space import Space, gguf_space, types_for, vllm_space

SECONDS_A_ROUND = 5.0
WORK = Work(8, 78, 128)
THROUGHPUT = Goal("throughput")
Effects = Mapping[tuple[str, Any], float]
GOOD: Effects = {
    ("quantization", "BF16"): 1.4,
    ("quantization", "Q6_K"): 0.8,
    ("max_batch_tokens", 128): 0.9,
    ("max_batch_tokens", 1024): 1.1,
    ("max_sequences", 4): 0.7,
    ("kv_type", "Q8_0"): 0.9,
    ("flash_attention", False): 0.8,
    ("speculation", "prompt_lookup"): 1.15,
}


def default() -> LlamaCppModel:
    return LlamaCppModel(name="m", source="/nowhere/m.gguf", quantization="Q8_0")


def space() -> Space:
    return gguf_space(
        default(), users=8, types=["BF16", "Q6_K", "Q5_K_M"], computes_on_cpu=False, expected={}
    )


def measured(tokens_per_second: float, ttft_seconds: float = 0.5) -> Measured:
    tpot = 8 / tokens_per_second
    return Measured(
        tokens_per_second, ttft_seconds, ttft_seconds, tpot, tpot, tpot, 50 / tokens_per_second,
        "estimated", 8,
    )  # fmt: skip


class Machine:
    """Gives what the effects of a model's keys make of 250 tok/s, with two per cent of noise."""

    def __init__(
        self, effects: Effects, fails: Callable[[ModelConfig], bool] | None = None
    ) -> None:
        self.effects, self.fails = effects, fails or (lambda _: False)
        self.asked: list[ModelConfig] = []
        self._dice = random.Random(1)

    def rate(self, model: ModelConfig) -> float:
        rate = 250.0
        for (key, value), factor in self.effects.items():
            if getattr(model, key) == value:
                rate *= factor
        return rate

    def __call__(self, candidate: Candidate, rounds: int) -> tuple[Result, float]:
        model = candidate.model
        self.asked.append(model)
        if self.fails(model):
            return Failed("no memory for so much"), SECONDS_A_ROUND
        rate = self.rate(model) * self._dice.gauss(1, 0.02)
        return measured(rate), rounds * SECONDS_A_ROUND


def search_of(
    machine: Callable[[Candidate, int], tuple[Result, float]],
    goal: Goal = THROUGHPUT,
    budget_seconds: float = 600.0,
    fits: Callable[[ModelConfig], str | None] = lambda _: None,
) -> Search:
    return Search(
        [space()], goal, budget_seconds, machine,
        fits=fits, begun=lambda *_: None, ended=lambda _: None,
    )  # fmt: skip


def tuned(machine: Machine, **options: Any) -> Outcome:
    search = search_of(machine, **options)
    search.run()
    return outcome_of(search, options.get("goal", THROUGHPUT), was_interrupted=False)


def test_it_finds_the_best_of_a_thousand_in_ten_minutes() -> None:
    machine = Machine(GOOD)
    outcome = tuned(machine)
    assert outcome.best is not None
    assert machine.rate(outcome.best.model) > 0.93 * 250 * 1.4 * 1.15 * 1.1
    assert outcome.comparison is not None
    ratio = outcome.comparison.ratio(lambda each: each.tokens_per_second)
    assert ratio is not None
    true = machine.rate(outcome.best.model) / 250
    assert ratio[1] < true < ratio[2]
    assert "Take it: " in outcome.reason
    # The budget, but for the pairs that a comparison has at least.
    assert sum(trial.seconds for trial in outcome.trials) < 700


def test_it_says_when_nothing_beats_the_default() -> None:
    machine = Machine({key: min(factor, 0.97) for key, factor in GOOD.items()})
    outcome = tuned(machine)
    assert outcome.best is not None
    assert outcome.best.is_default
    assert outcome.reason.startswith("Nothing beats the default surely. The best of ")


def test_something_is_compared_with_the_default_however_little_time_there_is() -> None:
    outcome = tuned(Machine(GOOD), budget_seconds=1.0)
    assert [trial.phase for trial in outcome.trials[:3]] == ["explore", "explore", "compare"]
    assert outcome.comparison is not None
    assert len(outcome.comparison.pairs) == 4


def test_what_fails_is_a_result() -> None:
    machine = Machine(GOOD, lambda model: getattr(model, "quantization", None) == "BF16")
    outcome = tuned(machine)
    assert outcome.best is not None
    assert outcome.best.model.quantization != "BF16"
    assert machine.rate(outcome.best.model) > 0.9 * 250 * 1.15 * 1.1
    assert {trial.result for trial in outcome.failed} == {Failed("no memory for so much")}


def test_a_default_that_fails_is_replaced() -> None:
    machine = Machine(GOOD, lambda model: getattr(model, "max_sequences", 0) == 16)
    outcome = tuned(machine)
    assert outcome.best is not None
    assert not outcome.best.is_default
    assert outcome.comparison is None
    assert machine.rate(outcome.best.model) > 0.9 * 250 * 1.4 * 1.15 * 1.1
    assert outcome.reason == ("Take it: the default does not work here (no memory for so much).")


def test_when_nothing_works_that_is_said() -> None:
    outcome = tuned(Machine(GOOD, lambda _: True), budget_seconds=100)
    assert outcome.best is None
    assert outcome.reason == "Nothing worked. The default: no memory for so much"


def test_what_cannot_fit_is_not_tried() -> None:
    machine = Machine(GOOD)
    outcome = tuned(machine, fits=lambda model: "too large" if model.max_sequences == 16 else None)
    assert all(model.max_sequences != 16 for model in machine.asked)
    assert Failed("too large") in {trial.result for trial in outcome.trials}


def test_values_that_do_not_go_together_are_never_measured() -> None:
    machine = Machine({("kv_type", "Q8_0"): 1.3, ("flash_attention", False): 1.3})
    tuned(machine)
    assert machine.asked
    assert not any(
        getattr(model, "kv_type", "") == "Q8_0" and not getattr(model, "flash_attention", True)
        for model in machine.asked
    )


def test_limits_come_before_speed() -> None:
    goal = Goal("cheapest", ttft_seconds=1.0)

    class Slow(Machine):
        def __call__(self, candidate: Candidate, rounds: int) -> tuple[Result, float]:
            _, seconds = super().__call__(candidate, rounds)
            late = getattr(candidate.model, "quantization", None) == "BF16"
            return measured(self.rate(candidate.model), 2.0 if late else 0.5), seconds

    machine = Slow(GOOD)
    outcome = tuned(machine, goal=goal)
    assert outcome.best is not None
    assert outcome.best.model.quantization != "BF16"
    assert machine.rate(outcome.best.model) > 0.95 * 250 * 1.15 * 1.1


def test_nothing_that_keeps_the_slo_is_said() -> None:
    outcome = tuned(Machine(GOOD), goal=Goal("cheapest", ttft_seconds=0.1))
    assert "It does not keep the SLO, and nothing that was tried does" in outcome.reason


def test_an_interrupted_search_goes_on_where_it_was(tmp_path: Path) -> None:
    def measure(machine: Machine, journal: Journal, most: int) -> Search:
        def one(candidate: Candidate, rounds: int) -> tuple[Result, float]:
            known = journal.take(candidate.model, rounds)
            if known is not None:
                return known
            if len(machine.asked) == most:
                raise KeyboardInterrupt
            result, seconds = machine(candidate, rounds)
            journal.append(candidate.model, rounds, result, seconds)
            return result, seconds

        return search_of(one)

    whole_machine = Machine(GOOD)
    whole = measure(whole_machine, Journal(tmp_path / "whole.jsonl"), 10_000)
    whole.run()

    machine, path = Machine(GOOD), tmp_path / "m.jsonl"
    for most in (1, 17, 45):
        search = measure(machine, Journal(path), most)
        with pytest.raises(KeyboardInterrupt):
            search.run()
        cut = outcome_of(search, THROUGHPUT, was_interrupted=True)
        assert len(cut.trials) == most
        assert cut.best is not None
        page(cut, WORK, "a machine")
    with path.open("a") as file:
        file.write('{"model": "broken o')
    last = measure(machine, Journal(path), 10_000)
    last.run()
    assert machine.asked == whole_machine.asked
    assert [trial.candidate for trial in last.trials] == [trial.candidate for trial in whole.trials]
    assert Journal(path).entries == len(whole.trials)


def test_the_winner_is_written_as_a_config_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    machine = Machine(GOOD)
    base = LlamaCppModel(name="m", source=str(tmp_path / "m.gguf"), quantization="Q8_0")
    search = Search(
        [gguf_space(base, users=8, types=["BF16"], computes_on_cpu=False, expected={})],
        THROUGHPUT, 600.0, machine,
        fits=lambda _: None, begun=lambda *_: None, ended=lambda _: None,
    )  # fmt: skip
    search.run()
    outcome = outcome_of(search, THROUGHPUT, was_interrupted=False)
    text = config_text(outcome, WORK, "a machine")
    assert "# Take it: " in text
    assert "# Quality: as published" in text
    (tmp_path / "rig.yaml").write_text(text)
    [model] = load_config(tmp_path / "rig.yaml").local_models
    assert outcome.best is not None
    assert model == outcome.best.model
    html = page(outcome, WORK, "a machine")
    assert html.count("<circle") == 2 * len(outcome.trials)
    assert "quantization BF16" in html


def test_engines_are_tried_by_what_they_are_worth() -> None:
    """One that is far slower gets its start, and little more."""

    class Both(Machine):
        def __call__(self, candidate: Candidate, rounds: int) -> tuple[Result, float]:
            if candidate.model.engine == "vllm":
                self.asked.append(candidate.model)
                return measured(90), 6 * SECONDS_A_ROUND
            return super().__call__(candidate, rounds)

    machine = Both(GOOD)
    vllm = VllmModel(name="m", engine="vllm", source="/nowhere/m")
    search = Search(
        [space(), vllm_space(vllm, users=8, has_cards=False, computes_fp8=False)],
        THROUGHPUT, 600.0, machine,
        fits=lambda _: None, begun=lambda *_: None, ended=lambda _: None,
    )  # fmt: skip
    search.run()
    of_vllm = [model for model in machine.asked if model.engine == "vllm"]
    assert 1 <= len(of_vllm) <= 3
    assert len(machine.asked) > 30


def test_types_lose_no_more_than_is_allowed() -> None:
    assert list(types_for("Q8_0", 0.01)) == ["BF16", "Q6_K", "Q5_K_M"]
    assert list(types_for("Q4_K_M", 0.01)) == ["BF16", "Q8_0", "Q6_K", "Q5_K_M"]
    assert "Q4_0" in list(types_for("Q8_0", 0.1))


def test_the_first_value_of_each_key_is_the_default_s() -> None:
    base = LlamaServerModel(
        name="m", engine="llama_server", source="/m.gguf", max_batch_tokens=333, kv_type="BF16"
    )
    found = gguf_space(base, users=3, types=[], computes_on_cpu=True, expected={})
    assert found.model(found.start) == base
    assert found.values["max_batch_tokens"][0] == 333
    assert found.values["kv_type"] == ("BF16", "F16", "Q8_0")
    assert found.values["max_sequences"] == (16, 6, 3, 2)
    assert "speculation" not in found.values


def test_trials_are_ranked_by_the_longer_ones() -> None:
    search = search_of(Machine(GOOD))
    one, other = (
        Candidate(0, point, space().model(point))
        for point in (space().start, (1, *space().start[1:]))
    )
    search.trials = [
        Trial(one, "explore", 1, 5.0, measured(300)),
        Trial(other, "explore", 1, 5.0, measured(400)),
        Trial(one, "halve", 2, 10.0, measured(310)),
    ]
    assert search.ranked() == [one, other]
