"""Drafts pay or are not made: simulated streams, with the step costs of a CPU and of a GPU."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.llamacpp.speculation import PromptLookup, Speculation, StepCost

VOCABULARY = 50_000
# Q8_0 of the embedded model on two CPU cores: milliseconds by rows.
TWO_CORES = {1: 10.0, 4: 26.0, 8: 41.0, 16: 74.0, 32: 140.0, 64: 272.0, 640: 2_650.0}
# The same on one.
ONE_CORE = {1: 11.8, 2: 30.9, 4: 39.7, 8: 57.4, 16: 90.1, 32: 161.9, 64: 305.0, 640: 2_900.0}


def cpu(rows: int) -> float:
    return float(np.interp(rows, list(TWO_CORES), list(TWO_CORES.values()))) / 1000


def one_core(rows: int) -> float:
    return float(np.interp(rows, list(ONE_CORE), list(ONE_CORE.values()))) / 1000


def gpu(rows: int) -> float:
    return 0.008 + 0.00005 * rows


def run(
    streams: list[tuple[list[int], list[int]]],
    cost: Callable[[int], float],
    speculation: Speculation,
    jitter: random.Random | None = None,
) -> float:
    """How much faster prompts are continued, together, than without drafts."""
    texts = [prompt[:] for prompt, _ in streams]
    answers = [prompt + continuation for prompt, continuation in streams]
    speculators = [speculation.of(text) for text in texts]
    seconds = plain_seconds = 0.0
    live = list(range(len(streams)))
    while live:
        rows, produced = 0, []
        for index in live:
            room = len(answers[index]) - len(texts[index])
            drafts = speculators[index].draft(texts[index], len(live), room - 1)
            assert len(drafts) <= max(room - 1, 0)
            rows += 1 + len(drafts)
            right = answers[index][len(texts[index]) :]
            accepted = next((n for n, d in enumerate(drafts) if d != right[n]), len(drafts))
            produced.append((index, right[: accepted + 1], len(drafts), accepted))
        noise = jitter.uniform(0.8, 1.25) if jitter else 1.0
        for index, tokens, proposed, accepted in produced:
            speculators[index].record(proposed, accepted)
            texts[index] += tokens
        speculation.observe(rows, cost(rows) * noise)
        seconds += cost(rows)
        plain_seconds += cost(len(live)) * sum(len(each[1]) for each in produced) / len(live)
        live = [index for index in live if len(texts[index]) < len(answers[index])]
    assert texts == answers
    return plain_seconds / seconds


def text_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def an_edit(rng: random.Random, document: list[int], every: int) -> list[int]:
    """The document with a few tokens replaced, dropped or put in now and then."""
    edited: list[int] = []
    position = 0
    while position < len(document):
        run = rng.randrange(every // 2, every * 3 // 2)
        edited += document[position : position + run]
        position += run + rng.randrange(4)
        edited += text_of(rng, rng.randrange(4))
    return edited


def chatter(rng: random.Random, length: int) -> list[int]:
    """Repeats its phrases often, but what follows a phrase is chance."""
    phrases = [text_of(rng, rng.randrange(3, 8)) for _ in range(20)]
    text: list[int] = []
    while len(text) < length:
        text += rng.choice(phrases)
    return text[:length]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("cost", "least"), [(cpu, 1.4), (one_core, 1.3), (gpu, 5.5)])
def test_editing_a_text_is_faster(seed: int, cost: Callable[[int], float], least: float) -> None:
    rng = random.Random(seed)
    document = text_of(rng, 400)
    stream = (document + text_of(rng, 30), an_edit(rng, document, every=40))
    assert run([stream], cost, Speculation(PromptLookup), rng) >= least


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cost", [cpu, one_core, gpu])
@pytest.mark.parametrize("clients", [1, 4, 16])
@pytest.mark.parametrize("make", [text_of, chatter])
def test_what_does_not_repeat_is_hardly_slower(
    seed: int,
    cost: Callable[[int], float],
    clients: int,
    make: Callable[[random.Random, int], list[int]],
) -> None:
    rng = random.Random(seed)
    speculation = Speculation(PromptLookup)
    streams = [(make(rng, 300), make(rng, 500)) for _ in range(clients)]
    assert run(streams, cost, speculation, rng) >= 0.97


@given(seed=st.integers(0, 10**6), keep=st.floats(0, 1), cost=st.sampled_from([cpu, one_core, gpu]))
@settings(max_examples=40, deadline=None)
def test_half_copied_text_is_never_much_slower(
    seed: int, keep: float, cost: Callable[[int], float]
) -> None:
    rng = random.Random(seed)
    prompt = text_of(rng, 300)
    answer: list[int] = []
    while len(answer) < 600:
        start, length = rng.randrange(300), rng.randrange(2, 12)
        answer += prompt[start : start + length] if rng.random() < keep else text_of(rng, length)
    assert run([(prompt, answer)], cost, Speculation(PromptLookup), rng) >= 0.965


def test_what_two_sequences_cost_says_nothing_about_long_drafts() -> None:
    rng = random.Random(4)
    speculation = Speculation(PromptLookup)
    run([(text_of(rng, 9), text_of(rng, 100)) for _ in range(2)], one_core, speculation)
    run([(text_of(rng, 9), text_of(rng, 100))], one_core, speculation)
    document = text_of(rng, 400)
    assert run([(document, an_edit(rng, document, every=40))], one_core, speculation) >= 1.3


def test_a_large_batch_on_a_cpu_drafts_next_to_nothing() -> None:
    rng = random.Random(1)
    speculation = Speculation(PromptLookup)
    document = text_of(rng, 300)
    streams = [(document[:], an_edit(rng, document, every=40)) for _ in range(16)]
    assert run(streams, cpu, speculation, rng) >= 0.97


def test_it_finds_out_when_work_begins_to_repeat() -> None:
    rng = random.Random(2)
    speculation = Speculation(PromptLookup)
    run([(text_of(rng, 300), chatter(rng, 2_000))], cpu, speculation)
    document = text_of(rng, 400)
    assert run([(document, an_edit(rng, document, every=40))], cpu, speculation) >= 1.3


class Liar:
    """Always sure of its guesses, and always for another reason."""

    def __init__(self, truth: list[int], *, right_until: int = 0) -> None:
        self.truth = truth
        self.right_until = right_until
        self.reasons = itertools.count(1)

    def evidence(self, tokens: Sequence[int], running: int) -> int:
        return next(self.reasons)

    def propose(self, tokens: Sequence[int], at_most: int) -> list[int]:
        is_right = len(tokens) < self.right_until
        return self.truth[len(tokens) :][:at_most] if is_right else [-1] * at_most


@pytest.mark.parametrize("cost", [cpu, one_core, gpu])
@pytest.mark.parametrize("clients", [1, 4, 16])
def test_however_wrong_drafts_are_they_cost_little(
    cost: Callable[[int], float], clients: int
) -> None:
    text = list(range(1_000))
    speculation = Speculation(lambda: Liar(text))
    assert run([([], text)] * clients, cost, speculation) >= 0.975


def test_only_one_draft_finds_out_what_larger_steps_cost() -> None:
    text = list(range(100))
    speculation = Speculation(lambda: Liar(text))
    speculation.observe(16, 0.074)
    speculators = [speculation.of(text) for _ in range(16)]
    assert sum(bool(each.draft(text, 16, 50)) for each in speculators) == 1


def test_success_is_no_licence_to_fail_for_long() -> None:
    text = list(range(6_000))
    speculation = Speculation(lambda: Liar(text, right_until=5_000))
    assert run([([], text[:5_000])], cpu, speculation) >= 1.5
    assert run([(text[:5_000], text[5_000:])], cpu, speculation) >= 0.94


def test_what_was_always_wrong_is_given_up() -> None:
    class Stubborn(Liar):
        def evidence(self, tokens: Sequence[int], running: int) -> int:
            return 1

    text = list(range(1_000))
    assert run([([], text)], cpu, Speculation(lambda: Stubborn(text))) >= 0.98


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_a_guess_is_what_followed_the_longest_match(tokens: list[int], at_most: int) -> None:
    lookup = PromptLookup()
    for end in range(len(tokens)):  # as tokens come, and in leaps
        if end % 3 == 0:
            lookup.evidence(tokens[:end], 1)
    evidence = lookup.evidence(tokens, 1)
    lengths = {end: common_end(tokens, end) for end in range(3, len(tokens))}
    if max(lengths.values(), default=0) < 3:
        assert not evidence
        return
    drafts = lookup.propose(tokens, at_most)
    assert len(drafts) == at_most
    # Only the latest places are compared: here they may not include the longest match.
    assert evidence > 1
    follows = [(tokens + drafts)[end : end + at_most] for end, n in lengths.items() if n >= 3]
    assert drafts in follows


def common_end(tokens: Sequence[int], end: int) -> int:
    matched = 0
    while matched < end and tokens[end - 1 - matched] == tokens[-1 - matched]:
        matched += 1
    return matched


def test_of_several_places_the_one_that_matches_furthest_back_counts() -> None:
    tokens = [1, 2, 3, 4, 5, 60, 0, 9, 3, 4, 5, 70, 0, 1, 2, 3, 4, 5]
    lookup = PromptLookup()
    assert lookup.evidence(tokens, 1) == (5).bit_length()
    assert lookup.propose(tokens, 3) == [60, 0, 9]


def test_a_loop_is_drafted_on() -> None:
    tokens = [9, 1, 2, 3, 1, 2, 3]
    lookup = PromptLookup()
    assert lookup.evidence(tokens, 1)
    assert lookup.propose(tokens, 7) == [1, 2, 3, 1, 2, 3, 1]


def test_no_draft_where_there_is_no_room() -> None:
    speculator = Speculation(PromptLookup).of([])
    assert speculator.draft([1, 2, 3] * 5, 1, 0) == []
    assert speculator.draft([1, 2, 3] * 5, 1, -1) == []


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 9, 18, 40, 64]), st.floats(0.001, 1.0)), max_size=40
    )
)
def test_step_costs_stay_within_what_was_measured(steps: list[tuple[int, float]]) -> None:
    cost = StepCost()
    for rows, seconds in steps:
        cost.observe(rows, seconds)
    longest = max((seconds for _, seconds in steps), default=0.0)
    for rows in range(1, 65):
        assert cost.seconds(rows) >= 0
        if steps and min(r for r, _ in steps) <= rows <= max(r for r, _ in steps):
            assert cost.seconds(rows) <= longest * 1.0001


def test_step_costs_are_linear_between_measurements() -> None:
    cost = StepCost()
    assert cost.seconds(3) == 0
    cost.observe(2, 0.020)
    assert cost.seconds(2) == pytest.approx(0.020)
    assert 0.020 < cost.seconds(8) < 0.080
    cost.observe(6, 0.040)
    assert [cost.seconds(rows) for rows in (1, 2, 4, 6)] == pytest.approx([0.015, 0.02, 0.03, 0.04])
    assert 0.040 < cost.seconds(12) < 0.080


def test_old_step_costs_are_forgotten() -> None:
    cost = StepCost()
    cost.observe(1, 0.010)
    cost.observe(5, 99.0)
    cost.observe(9, 0.050)
    assert cost.seconds(5) == 99
    for _ in range(100):
        cost.observe(1, 0.010)
        cost.observe(9, 0.050)
    assert cost.seconds(5) == pytest.approx(0.030)
    for _ in range(2_000):
        cost.observe(1, 0.010)
    assert cost.seconds(5) == pytest.approx(cost.seconds(1) * 2)
