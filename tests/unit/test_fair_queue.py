"""Who is served next: shares by weight, no credit from idling, strict classes, bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fairness import FairQueue
from serving.llamacpp.sampling import SamplingParams
from serving.llamacpp.sequence import Job, Phase, Sequence
from serving.protocol.tenancy import Priority


def a_sequence(
    tenant: str,
    *,
    weight: float = 1.0,
    priority: Priority = "interactive",
    prompt: int = 10,
    generated: int = 10,
) -> Sequence:
    job = Job(tenant=tenant, weight=weight, priority=priority)
    job.add([0] * prompt, limit=generated, params=[SamplingParams()], stop_strings=())
    return job.sequences[0]


class Machine:
    """A scheduler in small: slots, prefill chunks in fair order, a token a step for the others."""

    def __init__(self, slots: int = 4, chunk: int = 32) -> None:
        self.queue: FairQueue[Sequence] = FairQueue()
        self.slots = slots
        self.chunk = chunk
        self.running: list[Sequence] = []
        self.admitted: list[Sequence] = []
        self.tokens: Counter[str] = Counter()
        self.time = 0

    def push(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self.queue.push(sequence)

    def step(self) -> list[Sequence]:
        """What ended in this step."""
        self.time += 1
        while len(self.queue) and len(self.running) < self.slots:
            sequence = self.queue.pop()
            sequence.phase = Phase.PREFILL
            self.running.append(sequence)
            self.admitted.append(sequence)
        budget = self.chunk
        for sequence in self.queue.order(s for s in self.running if s.phase is Phase.PREFILL):
            count = min(sequence.remaining, budget)
            budget -= count
            self._compute(sequence, count)
        for sequence in self.running:
            if sequence.phase is Phase.DECODE:
                sequence.tokens.append(0)
                self._compute(sequence, 1)
            elif not sequence.remaining:
                sequence.phase = Phase.DECODE
        ended = [s for s in self.running if s.generated == s.limit]
        for sequence in ended:
            self.running.remove(sequence)
            sequence.phase = Phase.DONE
        return ended

    def _compute(self, sequence: Sequence, count: int) -> None:
        job = sequence.job
        sequence.computed += count
        self.tokens[job.tenant] += count
        self.queue.charge(job.tenant, job.weight, count, job.priority)

    def run_until(self, sequence: Sequence) -> int:
        """Steps until a sequence has ended."""
        start = self.time
        while sequence not in self.step():
            assert self.time - start < 100_000
        return self.time - start


def closed_loop(machine: Machine, steps: int, makers: list[Callable[[], Sequence]]) -> None:
    """Clients that send their next request when the last has ended."""
    machine.push(maker() for maker in makers)
    by_tenant = {maker().job.tenant: maker for maker in makers}
    for _ in range(steps):
        machine.push(by_tenant[ended.job.tenant]() for ended in machine.step())


def test_a_tenants_own_sequences_keep_their_order() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    sequences = [a_sequence("a") for _ in range(5)]
    for sequence in sequences:
        queue.push(sequence)
    assert [queue.pop() for _ in sequences] == sequences


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("head_start", [0, 1, 25, 400])
def test_behind_a_hundred_requests_one_waits_no_longer_than_behind_one(
    slots: int, head_start: int
) -> None:
    def wait(others: int) -> int:
        machine = Machine(slots=slots)
        machine.push(a_sequence("many") for _ in range(others))
        for _ in range(head_start):
            machine.step()
        one = a_sequence("one")
        machine.push([one])
        return machine.run_until(one)

    alone = Machine(slots=slots)
    request = a_sequence("one")
    alone.push([request])
    service = alone.run_until(request)
    assert wait(100) <= wait(1) + service


def test_its_prompt_does_not_wait_for_a_hundred_prompts_either() -> None:
    machine = Machine(slots=16, chunk=100)
    machine.push(a_sequence("many", prompt=1000) for _ in range(15))
    for _ in range(3):
        machine.step()
    one = a_sequence("one", prompt=100, generated=1)
    machine.push([one])
    # A turn of the other tenant at most, then its own chunk.
    assert machine.run_until(one) <= 3


@pytest.mark.parametrize(("heavy", "light"), [(2.0, 1.0), (3.0, 1.0), (1.0, 0.25)])
def test_tokens_are_shared_by_weight(heavy: float, light: float) -> None:
    machine = Machine(slots=6)
    closed_loop(
        machine,
        6_000,
        [lambda: a_sequence("heavy", weight=heavy, prompt=5, generated=40)] * 12
        + [lambda: a_sequence("light", weight=light, prompt=30, generated=15)] * 12,
    )
    assert machine.tokens["heavy"] / machine.tokens["light"] == pytest.approx(
        heavy / light, rel=0.05
    )


@given(
    lengths=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(1, 60)),
        min_size=20,
        max_size=80,
    ),
    slots=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_while_all_wait_no_tenant_is_ahead_by_more_than_its_slots_hold(
    lengths: list[tuple[str, int, int]], slots: int
) -> None:
    machine = Machine(slots=slots)
    machine.push(
        a_sequence(tenant, prompt=prompt, generated=new) for tenant, prompt, new in lengths
    )
    largest = max(prompt + new for _, prompt, new in lengths)
    tenants = {tenant for tenant, *_ in lengths}
    waiting = Counter(tenant for tenant, *_ in lengths)
    seen = 0
    while len(machine.queue):
        machine.step()
        for sequence in machine.admitted[seen:]:
            waiting[sequence.job.tenant] -= 1
        seen = len(machine.admitted)
        if all(waiting[tenant] > 0 for tenant in tenants):
            counts = [machine.tokens[tenant] for tenant in tenants]
            assert max(counts) - min(counts) <= 2 * slots * largest
    assert len(machine.admitted) == len(lengths)


def test_interactive_goes_before_batch_whatever_the_clocks_say() -> None:
    machine = Machine(slots=1)
    batch = a_sequence("new", priority="batch")
    machine.push(a_sequence("old") for _ in range(20))
    machine.push([batch])
    for _ in range(100):
        machine.step()
    machine.push([a_sequence("old")])
    machine.run_until(batch)
    assert machine.admitted[-1] is batch
    assert len(machine.admitted) == 22


def test_what_batch_used_is_not_held_against_interactive_requests() -> None:
    machine = Machine(slots=1)
    nightly = a_sequence("a", priority="batch", generated=5_000)
    machine.push([nightly])
    machine.run_until(nightly)
    machine.push([a_sequence("a"), a_sequence("b"), a_sequence("a"), a_sequence("b")])
    for _ in range(200):
        machine.step()
    assert [s.job.tenant for s in machine.admitted] == ["a", "a", "b", "a", "b"]


def test_nobody_starves_when_others_keep_sending() -> None:
    machine = Machine(slots=2)
    patient = a_sequence("patient", weight=0.5, prompt=100, generated=100)
    machine.push([patient])
    for number in range(2_000):
        machine.push([a_sequence(f"passer-by {number}"), a_sequence("greedy", weight=5.0)])
        if patient in machine.step():
            return
    pytest.fail("2,000 steps were not enough")


def test_idling_saves_up_no_credit() -> None:
    machine = Machine(slots=1)
    machine.push([a_sequence("sleeper")])
    busy = [a_sequence("busy") for _ in range(300)]
    machine.push(busy)
    machine.run_until(busy[200])
    before = Counter(machine.tokens)
    machine.push(a_sequence("sleeper") for _ in range(100))
    for _ in range(1_000):
        machine.step()
    gained = machine.tokens - before
    assert gained["sleeper"] == pytest.approx(gained["busy"], rel=0.05)


@pytest.mark.parametrize("order", ["alone new", "new alone"])
@pytest.mark.parametrize("is_still_running", [False, True])
def test_using_an_idle_machine_is_not_punished(order: str, is_still_running: bool) -> None:
    machine = Machine(slots=2)
    alone = a_sequence("alone", generated=5_000)
    machine.push([alone])
    for _ in range(4_500 if is_still_running else 5_010):
        machine.step()
    machine.push(a_sequence(tenant) for tenant in order.split() * 100)
    before = Counter(machine.tokens)
    for _ in range(400):
        machine.step()
    gained = machine.tokens - before
    assert gained["alone"] == pytest.approx(gained["new"], rel=0.15)


def test_a_newcomer_starts_beside_the_one_who_is_furthest_behind() -> None:
    machine = Machine(slots=1)
    machine.push([a_sequence("far ahead", prompt=3_000), a_sequence("behind")])
    machine.push(a_sequence(tenant) for tenant in ["far ahead", "behind"] * 20)
    for _ in range(150):
        machine.step()
    machine.push(a_sequence("newcomer") for _ in range(5))
    seen = len(machine.admitted)
    for _ in range(120):
        machine.step()
    tenants = Counter(s.job.tenant for s in machine.admitted[seen:])
    assert tenants["newcomer"] == 5
    assert tenants["behind"] >= 4
    assert not tenants["far ahead"]


def test_prompts_that_were_given_out_count_before_they_are_computed() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    for _ in range(5):
        queue.push(a_sequence("long", prompt=100))
    for _ in range(5):
        queue.push(a_sequence("short", prompt=30))
    tenants = [queue.pop().job.tenant for _ in range(6)]
    assert tenants == ["long", "short", "short", "short", "short", "long"]


def test_equals_take_turns() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    for tenant in "aaabbb":
        queue.push(a_sequence(tenant))
    first = queue.pop()
    first.phase = Phase.DONE  # cancelled before it cost anything
    assert (first.job.tenant, queue.pop().job.tenant) == ("a", "b")


def test_prompts_of_several_tenants_are_computed_in_turns() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    sequences = [
        a_sequence("batch", priority="batch"),
        *(a_sequence("a") for _ in range(3)),
        *(a_sequence("b", weight=2.0) for _ in range(4)),
    ]
    for sequence in sequences:
        queue.push(sequence)
    for _ in sequences:
        queue.pop()
    tenants = [sequence.job.tenant for sequence in queue.order(sequences)]
    assert tenants == ["a", "b", "b", "a", "b", "b", "a", "batch"]
    assert queue.order(sequences)[0] is sequences[1]


def test_what_did_not_fit_is_next_all_the_same() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    for tenant in "ab":
        queue.push(a_sequence(tenant))
    sequence = queue.pop()
    queue.push_front(sequence)
    assert queue.pop() is sequence


def test_a_preempted_sequence_is_the_next_of_its_tenant() -> None:
    machine = Machine(slots=2)
    machine.push(a_sequence("a", priority="batch", generated=50) for _ in range(4))
    machine.step()
    victim = machine.running.pop()
    victim.phase, victim.computed = Phase.WAITING, 0
    machine.queue.push_front(victim)
    assert machine.queue.waiting() == {"interactive": 0, "batch": 3}
    assert machine.queue.peek() is victim
    assert machine.queue.peek("interactive") is None
    while machine.running or len(machine.queue):
        machine.step()
    assert victim.generated == 50


def test_what_is_taken_out_is_not_given_out() -> None:
    queue: FairQueue[Sequence] = FairQueue()
    sequences = [a_sequence("a"), a_sequence("b"), a_sequence("a")]
    for sequence in sequences:
        queue.push(sequence)
    queue.remove(sequences[0])
    assert {queue.pop(), queue.pop()} == set(sequences[1:])
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_tenants_that_are_gone_are_forgotten() -> None:
    machine = Machine(slots=4)
    machine.push(a_sequence("steady") for _ in range(1_000))
    for number in range(300):
        machine.push([a_sequence(f"passer-by {number}", generated=3)])
        for _ in range(10):
            machine.step()
    while machine.running or len(machine.queue):
        machine.step()
    machine.push([a_sequence("last")])
    assert sum(map(len, machine.queue._classes.values())) < 20


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "pop", "push_front", "remove", "end", "charge"]),
            st.sampled_from("abc"),
            st.sampled_from(["interactive", "batch"]),
            st.integers(0, 5),
        ),
        max_size=120,
    )
)
@settings(max_examples=60, deadline=None)
def test_no_sequence_is_lost_or_doubled(
    operations: list[tuple[str, str, Priority, int]],
) -> None:
    queue: FairQueue[Sequence] = FairQueue()
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    for what, tenant, priority, number in operations:
        if what == "push":
            waiting.append(a_sequence(tenant, priority=priority))
            queue.push(waiting[-1])
        elif what == "pop" and waiting:
            sequence = queue.pop()
            waiting.remove(sequence)
            running.append(sequence)
            interactive = any(s.job.priority == "interactive" for s in waiting)
            assert not (interactive and sequence.job.priority == "batch")
        elif what == "push_front" and running:
            waiting.append(running.pop(number % len(running)))
            queue.push_front(waiting[-1])
            assert queue.order(running) is not None
        elif what == "remove" and waiting:
            queue.remove(waiting.pop(number % len(waiting)))
        elif what == "end" and running:
            running.pop(number % len(running)).phase = Phase.DONE
        elif what == "charge":
            queue.charge(tenant, 1.0, number, priority)
        assert len(queue) == len(waiting)
        counts = Counter(s.job.priority for s in waiting)
        assert queue.waiting() == {
            "interactive": counts["interactive"],
            "batch": counts["batch"],
        }
        assert set(queue.order(running)) == set(running)
