"""The scheduler on the real model: prefix reuse, fair shares, preemption, KV accounting."""

from __future__ import annotations

import math
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from serving.llamacpp.runtime import Context, Model, RuntimeFault
from serving.llamacpp.sampling import SamplingParams, log_softmax
from serving.llamacpp.sequence import Failed, Finished, Job, Sequence
from serving.llamacpp.slots import SMALLEST_USEFUL_PREFIX
from serving.llamacpp.speculation import PromptLookup, Speculation, speculation_of
from tests.engine.scheduling import GREEDY, Bench
from tests.processes import wait_for
from tests.tiny_models import write_mamba

STORY = (
    "Describe a voyage across the ocean, the ship, its captain and crew, the weather they met on "
    "their way, the islands they saw and the people who lived there. "
)
RIVER = "Name the rivers of Europe, their sources, their lengths, and the cities on their banks. "
# The soak's length; `make soak` sets more.
SOAK_REQUESTS = int(os.environ.get("RIGSERVE_SOAK_REQUESTS", "40"))


def computed(bench: Bench) -> int:
    return bench.scheduler.stats.prefill_tokens


def test_requests_that_come_together_compute_a_shared_prompt_once(model_path: Path) -> None:
    with Bench(model_path, slots=8) as bench:
        shared = bench.tokens(STORY * 6)
        prompts = [shared + bench.tokens(f"Question {n}: {n * 17}?") for n in range(8)]
        jobs = [bench.submit(prompt, limit=4) for prompt in prompts]
        bench.ends(8)
        distinct = len(shared) + sum(len(prompt) - len(shared) for prompt in prompts)
        assert computed(bench) <= 1.15 * distinct
        usages = [job.usage(1) for job in jobs]
        assert sum(u.prompt_tokens - u.cached_tokens for u in usages) == computed(bench)
        assert [u.prompt_tokens for u in usages] == [len(prompt) for prompt in prompts]


def test_choices_share_their_prompt(model_path: Path) -> None:
    with Bench(model_path) as bench:
        job = bench.run(STORY * 3, choices=4, limit=8, top_logprobs=0)
        prompt = len(bench.tokens(STORY * 3))
        assert computed(bench) == prompt + 3  # each computes the last prompt token, for its logits
        assert job.usage(4).prompt_tokens == prompt
        first = [bench.logprobs[sequence][0].logprob for sequence in job.sequences]
        assert first == pytest.approx([first[0]] * 4, abs=0.1)


@pytest.mark.parametrize("store_bytes", [1 << 28, 0])
def test_a_chat_computes_only_what_is_new_also_with_more_chats_than_slots(
    model_path: Path, store_bytes: int
) -> None:
    chats = 4
    with Bench(model_path, slots=2, store_bytes=store_bytes) as bench:
        histories = [bench.tokens(f"Chat {n * 31}. {STORY * 2}") for n in range(chats)]
        for turn in range(3):
            for chat in range(chats):
                question = bench.tokens(f" And then, number {turn * 13 + chat}?") if turn else []
                prompt, before = histories[chat] + question, computed(bench)
                job = bench.run(prompt, limit=6)
                new = computed(bench) - before
                assert job.usage(1).cached_tokens == len(prompt) - new
                if turn and store_bytes:
                    # The question, and the last token of the answer, which was never computed.
                    assert new == len(question) + 1
                elif turn:
                    # Nowhere to keep it: two slots, four chats. Only what all chats begin with is there.
                    assert new > len(prompt) - SMALLEST_USEFUL_PREFIX
                histories[chat] = job.sequences[0].tokens


def test_the_least_recently_used_prefix_is_dropped_first(model_path: Path) -> None:
    with Bench(model_path, slots=1) as probe:
        probe.run(STORY * 2, limit=1)
        cells = probe.context.save(0)
        assert cells is not None
    with Bench(model_path, slots=1, store_bytes=int(2.5 * len(cells))) as bench:
        first, second, third, fourth = (f"{n * 37}: {STORY * 2}" for n in range(4))
        for prompt in (first, second, first, third, fourth):  # the store ends with first and third
            bench.run(prompt, limit=1)
        assert bench.run(first, limit=1).usage(1).cached_tokens > 32
        assert bench.run(second, limit=1).usage(1).cached_tokens < 32


def test_prefixes_are_saved_while_there_is_nothing_else_to_do(model_path: Path) -> None:
    with Bench(model_path, slots=1) as bench:
        stored: list[int] = []

        def look() -> None:
            stored.append(bench.scheduler.load().prefix_store_bytes)

        bench.run(STORY, limit=1)
        wait_for(lambda: bench.scheduler.load().prefix_store_bytes > 0, "it is saved")
        look()
        bench.at_first_text = look
        bench.run(RIVER, limit=4)
        # To give the slot away, nothing more had to be.
        assert stored[0] == stored[1]
        assert bench.run(STORY, limit=1).usage(1).cached_tokens == len(bench.tokens(STORY)) - 1


def test_scored_prompts_share_the_rows_of_a_step_whose_scores_are_kept(model_path: Path) -> None:
    with Bench(model_path, slots=4, batch_tokens=256) as bench:
        for number in range(4):
            bench.submit(f"{number}: {STORY * 2}", limit=1, echo=True, top_logprobs=1)
        bench.ends(4)
        steps = bench.scheduler.stats.prefill_steps
        assert max(float(rows) for rows in steps if steps[rows]) <= 64


def test_batch_gives_way_to_interactive_and_loses_nothing(model_path: Path) -> None:
    prompts = [f"{n}: {STORY}" for n in range(4)]
    with Bench(model_path, slots=2) as bench:
        alone = [bench.generated(bench.run(prompt, limit=60)) for prompt in prompts[:2]]
    with Bench(model_path, slots=2) as bench:
        batch = [bench.submit(prompt, limit=60, priority="batch") for prompt in prompts[:2]]
        while not all(job.sequences[0].generated > 5 for job in batch):
            pass
        quick = [bench.submit(prompt, limit=5) for prompt in prompts[2:]]
        ends = bench.ends(4)
        assert [end.sequence.job for end in ends[:2]] in (quick, quick[::-1])
        assert bench.scheduler.stats.preemptions == 2
        for job, tokens in zip(batch, alone, strict=True):
            assert bench.generated(job) == tokens
            text = b"".join(map(bench.model.piece, tokens)).decode(errors="replace")
            assert bench.text[job.sequences[0]] == text
            assert job.usage(1).completion_tokens == 60
        # What they had computed was kept: only each one's last token, and no prompt, was computed again.
        assert computed(bench) == sum(len(bench.tokens(p)) for p in prompts) + 2


def test_a_pool_too_small_for_all_queues_and_preempts_but_fails_nobody(model_path: Path) -> None:
    with Bench(model_path, slots=6, context_length=256, kv_tokens=256) as bench:
        jobs = [bench.submit(f"{n * 41}: {RIVER}", limit=90) for n in range(6)]
        ends = bench.ends(6)
        assert all(isinstance(end, Finished) and end.reason == "length" for end in ends)
        assert all(job.sequences[0].generated == 90 for job in jobs)
        assert bench.scheduler.stats.preemptions > 0
        assert bench.scheduler.load().running == 0


def test_a_tenant_with_one_request_does_not_wait_for_anothers_hundred(model_path: Path) -> None:
    """It starts as early behind a hundred requests of another tenant as behind one."""

    def place(others: int) -> int:
        with Bench(model_path, slots=1, context_length=256) as bench:
            mine: list[Job] = []

            def more() -> None:
                for n in range(others):
                    bench.submit(f"{n} {RIVER}", limit=2, tenant="many")
                mine.append(bench.submit(f"mine {RIVER}", limit=2, tenant="one"))

            bench.at_first_text = more
            bench.submit(RIVER, limit=12, tenant="many")
            bench.ends(others + 2)
            return bench.order.index(mine[0].sequences[0])

    assert place(40) == place(1) == 1


def test_a_heavier_tenant_gets_more(model_path: Path) -> None:
    with Bench(model_path, slots=1, context_length=256) as bench:
        bench.at_first_text = lambda: [
            bench.submit(f"{n * 7} {tenant} {RIVER}", limit=4, tenant=tenant, weight=weight)
            for n in range(9)
            for tenant, weight in (("light", 1.0), ("heavy", 2.0))
        ]
        bench.submit(RIVER, limit=20, tenant="blocker")
        bench.ends(1 + 2 * 9)
        first_half = [sequence.job.tenant for sequence in bench.order[1:10]]
        assert first_half.count("heavy") == pytest.approx(6, abs=1)


def test_cancelled_in_the_queue_before_and_after_it_was_taken_in(model_path: Path) -> None:
    with Bench(model_path, slots=1) as bench:
        running = bench.submit(STORY, limit=30)
        waiting = [bench.submit(f"{n} {STORY}") for n in range(3)]
        for job in waiting:
            bench.scheduler.cancel(job)
            bench.scheduler.cancel(job)
        ends = bench.ends(4)
        assert {end.sequence.job for end in ends} == {running, *waiting}
        assert all(job.usage(1).completion_tokens == 0 for job in waiting)
        assert bench.run(STORY).done


def test_logprobs_are_a_log_softmax_of_the_raw_logits(model_path: Path) -> None:
    """Whatever sampling does with them: here a bias, a penalty and a temperature."""
    params = SamplingParams(temperature=0.7, frequency_penalty=1.0, logit_bias=((28, 5.0),), seed=3)
    with Bench(model_path) as bench:
        job = bench.run(STORY, limit=8, params=params, top_logprobs=5)
        tokens = job.sequences[0].tokens
        reported = bench.logprobs[job.sequences[0]]
    model = Model(model_path, gpu_layers=0)
    context = Context(model, slots=1, context_length=512, batch_tokens=512, threads=1)
    rows = len(tokens) - 1
    context.decode(tokens[:-1], range(rows), [0] * rows, [True] * rows)
    for row, entry in zip(range(rows - 8, rows), reported, strict=True):
        logits = context.logits(row).astype(np.float64)
        expected = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert entry.logprob == pytest.approx(expected[tokens[row + 1]], abs=0.05)
        assert [p for _, p in entry.top] == pytest.approx(np.sort(expected)[:-6:-1], abs=0.05)
        assert np.allclose(log_softmax(context.logits(row)), expected)
    context.close()
    model.close()


def test_an_echoed_prompt_is_scored_token_by_token(model_path: Path) -> None:
    with Bench(model_path) as bench:
        made = bench.run(STORY, limit=6, top_logprobs=0)
        tokens = made.sequences[0].tokens
        scored = bench.run(tokens, limit=0, echo=True, top_logprobs=2)
        assert scored.usage(1).completion_tokens == 0
        assert scored.usage(1).cached_tokens == 0
        entries = bench.logprobs[scored.sequences[0]]
        assert len(entries) == len(tokens)
        assert entries[0].logprob is None
        assert bench.text[scored.sequences[0]] == bench.model.detokenize(tokens)
        for entry, again in zip(bench.logprobs[made.sequences[0]], entries[-6:], strict=True):
            assert entry.logprob == pytest.approx(again.logprob, abs=0.05)


def test_prompts_go_first_while_more_wait_for_a_first_token(model_path: Path) -> None:
    with Bench(model_path, slots=8, batch_tokens=32) as bench:
        prompts = [[2000 + n] * 30 for n in range(8)]  # one a step
        bench.at_first_text = lambda: [bench.submit(prompt, limit=2) for prompt in prompts[1:]]
        bench.submit(prompts[0], limit=2)
        bench.ends(8)
        assert sum(bench.scheduler.stats.prefill_steps.values()) == 8
        assert sum(bench.scheduler.stats.decode_steps.values()) <= 6


def test_but_not_for_long(model_path: Path) -> None:
    with Bench(model_path, batch_tokens=32) as bench:
        prompts = [[2000 + n] * 300 for n in range(3)]
        bench.at_first_text = lambda: [bench.submit(prompt, limit=1) for prompt in prompts]
        decoding = bench.submit(RIVER, limit=6)
        ends = [end.sequence.job for end in bench.ends(4)]
        assert ends.index(decoding) < 3


def test_a_scored_prompt_is_told_once_also_after_a_preemption(model_path: Path) -> None:
    with Bench(model_path, slots=1) as bench:
        (alone,) = bench.run(STORY * 2, limit=20, echo=True, top_logprobs=0).sequences
        bench.at_first_text = lambda: bench.submit(RIVER, limit=2)
        (preempted,) = bench.submit(
            STORY * 2, limit=20, echo=True, top_logprobs=0, priority="batch"
        ).sequences
        bench.ends(2)
        assert bench.scheduler.stats.preemptions == 1
        told = [entry.piece for entry in bench.logprobs[preempted]]
        assert told == [entry.piece for entry in bench.logprobs[alone]]
        assert len(told) == len(alone.tokens)


def test_interactive_work_is_not_suspended_for_a_batch_prompt(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspended: list[str] = []
    with Bench(model_path, context_length=512, kv_tokens=512, batch_tokens=512) as bench:
        bench.at_first_text = lambda: bench.submit(STORY * 9, limit=1, priority="batch")
        suspend = bench.scheduler._suspend

        def noting(victim: Sequence) -> None:
            suspended.append(victim.job.priority)
            suspend(victim)

        monkeypatch.setattr(bench.scheduler, "_suspend", noting)
        talks = [bench.submit(f"{n} {RIVER}", limit=110) for n in range(2)]
        bench.ends(3)
        assert all(talk.sequences[0].generated == 110 for talk in talks)
    assert set(suspended) <= {"batch"}


def test_interactive_work_waits_for_no_batch_prompt_that_it_shares(model_path: Path) -> None:
    with Bench(model_path, slots=2, batch_tokens=32) as bench:
        batch = bench.submit(STORY * 9, limit=1, priority="batch")
        while not batch.sequences[0].computed:
            pass
        urgent = bench.submit(STORY * 5 + "So?", limit=1)
        bench.ends(2)
        assert bench.order == [*urgent.sequences, *batch.sequences]


def test_batch_work_is_not_suspended_in_vain(model_path: Path) -> None:
    """A prompt too long for the pool, also without the batch sequence, waits for what must end anyway."""
    with Bench(model_path, slots=3, context_length=512, kv_tokens=512) as bench:
        bench.at_first_text = lambda: bench.submit(f"Now: {STORY * 8}", limit=1)
        bench.submit(STORY * 8, limit=30)
        bench.submit(RIVER, limit=8, priority="batch")
        bench.ends(3)
        assert bench.scheduler.stats.preemptions == 0


def test_after_a_failed_copy_slots_are_given_out_again(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        monkeypatch.undo()
        raise RuntimeFault("llama_decode failed with status -3")

    with Bench(model_path, slots=2) as bench:
        bench.at_first_text = lambda: bench.submit(STORY * 2, limit=1)
        bench.submit(RIVER, limit=8)  # in slot 0, while the other is in slot 1
        bench.ends(2)
        monkeypatch.setattr(bench.context, "decode", failing)
        bench.submit(STORY * 2 + "And?")  # in slot 0, with a copy of slot 1's cells
        assert isinstance(bench.ends(1)[0], Failed)
        assert bench.run(STORY, limit=1).done


def test_a_recurrent_models_state_goes_on_or_is_computed_anew(
    model_path: Path, tmp_path: Path
) -> None:
    path = write_mamba(tmp_path / "mamba.gguf", model_path)
    with Bench(path, slots=1, store_bytes=0) as alone:
        base = alone.tokens(STORY * 2)
        prompts = [base, [*base[:50], *alone.tokens(RIVER)]]
        expected = [alone.run(prompt, limit=20, top_logprobs=0) for prompt in prompts]
        answer = alone.generated(expected[0])
        prompts.append([*base, *answer, *alone.tokens(RIVER)])
        expected.append(alone.run(prompts[2], limit=20, top_logprobs=0))
    with Bench(path, slots=2) as bench:
        # One goes on where the first stopped, one begins alike but can't be cut back to there.
        jobs = [bench.run(prompt, limit=20, top_logprobs=0) for prompt in prompts]
        assert [bench.generated(job) for job in jobs] == [alone.generated(job) for job in expected]
        assert jobs[1].usage(1).cached_tokens == 0
        assert jobs[2].usage(1).cached_tokens == len(base) + len(answer) - 1
        with pytest.raises(RuntimeFault, match="recurrent"):
            speculation_of(
                "prompt_lookup", bench.model, None, context_length=512, threads=1, gpu_layers=0
            )


def test_speculation_changes_no_token(model_path: Path) -> None:
    text = STORY * 3 + "Again: " + STORY
    prompts = [text, f"{RIVER * 4}{RIVER[:30]}"]
    with Bench(model_path, slots=1) as bench:
        plain = [bench.generated(bench.run(prompt, limit=60)) for prompt in prompts]
    with Bench(model_path, slots=1, speculation=Speculation(PromptLookup)) as bench:
        drafted = [bench.generated(bench.run(prompt, limit=60)) for prompt in prompts]
        assert bench.scheduler.stats.accepted_tokens > 0
        # The cells were rewound rightly too: the same conversation goes on from them.
        again = bench.run(bench.tokens(prompts[1]) + drafted[1] + bench.tokens(" So"), limit=10)
        assert again.usage(1).cached_tokens > 60
        reference = bench.generated(again)
    assert drafted == plain
    with Bench(model_path, slots=1) as bench:
        prompt = bench.tokens(prompts[1]) + plain[1] + bench.tokens(" So")
        assert bench.generated(bench.run(prompt, limit=10)) == reference


def test_a_stuck_step_ends_the_process(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with Bench(model_path, batch_tokens=512, step_timeout_seconds=0.01) as bench:
        number = 0
        while not exits:
            number += 1  # another prompt each time, as what is cached takes no long step
            bench.run(f"{number} {STORY * 10}", limit=2)
    assert set(exits) == {70}
    assert "a step did not end within 0.01 s" in caplog.text


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kv_tokens", [None, 400])
def test_soak(half_precision_path: Path, kv_tokens: int | None) -> None:
    """Whatever comes in whatever order: all slots free, all usage exact, every sequence as if alone."""
    chance = random.Random(SOAK_REQUESTS)
    jobs: list[tuple[Job, int, int]] = []
    cancelled: set[Job] = set()
    timers: list[threading.Timer] = []
    speculation = Speculation(PromptLookup)
    with Bench(
        half_precision_path,
        context_length=256,
        batch_tokens=64,
        kv_tokens=kv_tokens,
        store_bytes=1 << 24,
        speculation=speculation,
    ) as bench:
        base = bench.tokens(STORY * 8)
        for number in range(SOAK_REQUESTS):
            tail = [chance.randrange(1000, 40000) for _ in range(chance.choice([1, 3, 30]))]
            prompt = base[: chance.choice([0, 5, 40, 100, 150])] + tail
            choices, limit = chance.choice([1, 1, 1, 2, 3]), chance.choice([1, 5, 20, 60])
            job = bench.submit(
                prompt,
                limit=limit,
                choices=choices,
                params=chance.choice([GREEDY, SamplingParams(temperature=1.0, seed=number)]),
                priority=chance.choice(["batch", "interactive"]),
                tenant=chance.choice("abc"),
                top_logprobs=0,
            )
            jobs.append((job, len(prompt), limit))
            if chance.random() < 0.15:
                cancelled.add(job)
                timers.append(threading.Timer(chance.random(), bench.scheduler.cancel, [job]))
                timers[-1].start()
            threading.Event().wait(chance.choice([0, 0, 0.02, 0.05]))
        ends = bench.ends(sum(len(job.sequences) for job, _, _ in jobs))
        for timer in timers:
            timer.join()
        assert not [end for end in ends if isinstance(end, Failed)]
        load = bench.scheduler.load()
        assert (load.running, load.waiting, load.kv_used_tokens) == (0, 0, 0)
        for job, prompt_tokens, limit in jobs:
            usage = job.usage(len(job.sequences))
            if job not in cancelled:
                assert usage.prompt_tokens == prompt_tokens
                assert usage.completion_tokens == limit * len(job.sequences)
            for sequence in job.sequences:
                assert len(bench.logprobs.get(sequence, [])) <= sequence.generated
        sample = chance.sample([s for job, _, _ in jobs for s in job.sequences], 30)
        with Bench(half_precision_path, slots=1, context_length=256, store_bytes=0) as alone:
            differences: list[float] = []
            for sequence in sample:
                reported = bench.logprobs.get(sequence, [])
                scored = alone.run(sequence.tokens, limit=0, echo=True, top_logprobs=0)
                expected = alone.logprobs[scored.sequences[0]][sequence.prompt_tokens :]
                for entry, other in zip(reported, expected, strict=False):
                    assert entry.logprob is not None
                    assert other.logprob is not None
                    differences.append(abs(entry.logprob - other.logprob))
    # Kernels for one row and for many round differently; a neighbour's cells would differ by whole nats.
    assert max(differences) < 0.05
