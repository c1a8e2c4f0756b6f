"""Who goes to an engine now, who waits, and who is refused: in a process, with an engine that only counts."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import LlamaCppModel
from serving.engines.supervisor import Endpoint, EngineState
from serving.gateway.admission import Admission, Ticket
from serving.metrics import Metrics
from serving.protocol.errors import ApiError
from serving.protocol.tenancy import Priority, Tenancy
from tests.simulated_time import simulate

# Four slots, and one request more so that the engine always has its next.
CAPACITY = 5


class Rig:
    """An engine's name and state, all that admission looks at."""

    def __init__(self, name: str = "m", *, ready: bool = True, **options: Any) -> None:
        self.model = LlamaCppModel(name=name, source="m.gguf", **{"max_sequences": 4, **options})
        self.id = f"{name}#1"
        self.state = EngineState.READY if ready else EngineState.UNLOADED

    @property
    def endpoint(self) -> Endpoint | None:
        return Endpoint("http://127.0.0.1:1", "") if self.state is EngineState.READY else None


def a_tenant(name: str = "-", weight: float = 1.0, priority: Priority = "interactive") -> Tenancy:
    return Tenancy(name, weight, priority)


class Door:
    """Admission to one engine."""

    def __init__(self, rig: Rig | None = None) -> None:
        self.rig: Any = rig or Rig()
        self.metrics = Metrics()
        self.admission = Admission(self.metrics, monotonic=asyncio.get_running_loop().time)

    def enter(
        self, owner: Tenancy | None = None, units: int = 1, deadline: float | None = None
    ) -> Ticket:
        return self.admission.enter(self.rig, owner or a_tenant(), units, deadline)

    def refusal(self, *arguments: Any, **options: Any) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.enter(*arguments, **options)
        return caught.value

    def becomes(self, state: EngineState) -> None:
        self.rig.state = state
        self.admission.changed(self.rig)

    @property
    def in_flight(self) -> int:
        return self.admission.in_flight(self.rig)

    @property
    def waiting(self) -> int:
        return self.admission.waiting(self.rig)


def test_an_engine_gets_what_it_can_work_on_and_the_rest_waits() -> None:
    async def main() -> None:
        door = Door()
        tickets = [door.enter() for _ in range(CAPACITY + 2)]
        assert [t.is_waiting for t in tickets] == [False] * CAPACITY + [True] * 2
        waits = asyncio.create_task(tickets[CAPACITY].wait())
        tickets[0].release(10)
        tickets[0].release(10)
        await waits
        assert (door.in_flight, door.waiting) == (CAPACITY, 1)

    simulate(main())


def test_requests_for_an_adapter_are_counted_until_they_have_ended() -> None:
    async def main() -> None:
        door = Door(Rig(max_sequences=1))

        def enter(adapter: str | None) -> Ticket:
            return door.admission.enter(door.rig, a_tenant(), 1, adapter=adapter)

        def counted() -> list[int]:
            return [door.admission.requests_with(door.rig, name) for name in ("a", "b")]

        assert counted() == [0, 0]
        running, other, plain = enter("a"), enter("b"), enter(None)
        waiting = enter("a")
        assert waiting.is_waiting
        assert counted() == [2, 1]
        # Of one that waits, nobody knows yet when it will be let through.
        assert door.admission.oldest_with(door.rig, "a") == running.started_at
        plain.release()
        running.release(3)
        running.release(3)
        assert counted() == [1, 1]
        assert door.admission.oldest_with(door.rig, "a") == waiting.started_at
        assert waiting.started_at is not None
        # One that leaves the queue, and one that is turned away in it.
        other.release()
        last = enter("b")
        last.release()
        door.becomes(EngineState.STOPPED)
        waiting.release()
        assert counted() == [0, 0]

    simulate(main())


def test_several_completions_count_as_many_and_one_that_is_too_large_goes_alone() -> None:
    async def main() -> None:
        door = Door()
        large = door.enter(units=100)
        small = door.enter()
        assert (large.is_waiting, small.is_waiting) == (False, True)
        large.release()
        assert not small.is_waiting
        next_large = door.enter(units=2)
        waiting = door.enter(units=4)
        # What comes later does not overtake it.
        last = door.enter()
        assert [t.is_waiting for t in (next_large, waiting, last)] == [False, True, True]
        waiting.release()
        assert not last.is_waiting

    simulate(main())


def test_batches_do_not_crowd_out_interactive_requests() -> None:
    async def main() -> None:
        door = Door(Rig(max_queue=2))
        batch = a_tenant(priority="batch")
        running = [door.enter(batch) for _ in range(CAPACITY)]
        queued = [door.enter(batch) for _ in range(2)]
        assert door.refusal(batch).code == "queue_full"
        now = [door.enter() for _ in range(CAPACITY)]
        assert not any(t.is_waiting for t in now)
        later = [door.enter() for _ in range(2)]
        for ticket in (*running, *now):
            ticket.release()
        assert not any(t.is_waiting for t in later)
        assert not any(t.is_waiting for t in queued)

    simulate(main())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def main() -> None:
        door = Door(Rig(max_queue=0))
        tickets = [door.enter() for _ in range(CAPACITY)]
        refusal = door.refusal()
        assert (refusal.status, refusal.code, refusal.retry_after_seconds) == (503, "queue_full", 1)
        tickets[0].release()
        assert not door.enter().is_waiting
        text = door.metrics.exposition().decode()
        assert 'rigserve_admission_refusals_total{model="m",reason="queue_full"} 1.0' in text

    simulate(main())


def test_in_a_full_queue_who_has_most_makes_place_for_others() -> None:
    async def main() -> None:
        door = Door(Rig(max_queue=4))
        for _ in range(CAPACITY):
            door.enter(a_tenant("greedy"))
        greedy = [door.enter(a_tenant("greedy")) for _ in range(4)]
        modest = door.enter(a_tenant("modest"))
        assert modest.is_waiting
        with pytest.raises(ApiError) as caught:
            await greedy[-1].wait()
        assert caught.value.code == "queue_full"
        assert door.waiting == 4
        assert door.refusal(a_tenant("greedy")).code == "queue_full"

    simulate(main())


def test_deadlines_are_refused_early_by_what_requests_take_and_late_when_they_pass() -> None:
    async def main() -> None:
        door = Door()
        # Requests take 50 ms: 100 a second.
        for _ in range(2):
            tickets = [door.enter() for _ in range(CAPACITY)]
            await asyncio.sleep(0.05)
            for ticket in tickets:
                ticket.release(10)
        running = [door.enter() for _ in range(CAPACITY)]
        for _ in range(198):
            door.enter()
        # 1.99 seconds from now.
        refusal = door.refusal(deadline=1.9)
        assert refusal.code == "deadline_unmeetable"
        assert refusal.retry_after_seconds == 2
        hopeful = door.enter(a_tenant("other"), deadline=0.2)
        with pytest.raises(ApiError) as caught:
            await hopeful.wait()
        assert caught.value.code == "deadline_unmeetable"
        assert door.waiting == 198
        assert door.refusal(deadline=0).code == "deadline_unmeetable"
        running[0].release()

    simulate(main())


def test_requests_wait_for_their_model_and_it_owes_them_a_turn() -> None:
    async def main() -> None:
        door = Door(Rig(ready=False))
        told = []
        door.admission.listen(lambda: told.append(1))
        tickets = [door.enter() for _ in range(CAPACITY + 1)]
        counting = door.enter(units=0)
        assert told
        assert all(t.is_waiting for t in (*tickets, counting))
        door.becomes(EngineState.READY)
        assert [t.is_waiting for t in tickets] == [False] * CAPACITY + [True]
        assert not counting.is_waiting
        assert door.admission.owes(door.rig)
        tickets[0].release()
        assert not door.admission.owes(door.rig)
        door.becomes(EngineState.UNLOADED)
        assert door.refusal(deadline=0).code == "model_not_ready"

    simulate(main())


def test_a_model_that_cannot_be_loaded_refuses_and_is_tried_again_later() -> None:
    async def main() -> None:
        door = Door(Rig(ready=False))
        ticket = door.enter()
        door.admission.load_failed(door.rig, "why")
        with pytest.raises(ApiError) as caught:
            await ticket.wait()
        assert (caught.value.status, caught.value.code) == (503, "model_load_failed")
        assert "why" in caught.value.message
        assert door.refusal().code == "model_load_failed"
        await asyncio.sleep(1.0)
        assert door.enter().is_waiting
        door.becomes(EngineState.STOPPED)
        assert door.waiting == 0
        # As for a route's request that comes to it after a reload.
        refusal = door.refusal()
        assert (refusal.status, refusal.code) == (503, "model_not_ready")
        assert not door.admission._lines

    simulate(main())


def test_an_engine_that_is_to_leave_gets_nothing_more() -> None:
    async def main() -> None:
        door = Door()
        first = door.enter()
        door.admission.hold(door.rig, closed=True)
        second = door.enter()
        first.release()
        assert second.is_waiting
        door.admission.hold(door.rig, closed=False)
        assert not second.is_waiting

    simulate(main())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_leaks_whatever_happens_to_requests(seed: int) -> None:
    dice = random.Random(seed)

    async def request(door: Door) -> None:
        owner = a_tenant(
            dice.choice("abc"), dice.choice((1.0, 3.0)), dice.choice(("interactive", "batch"))
        )
        deadline = dice.choice((None, 0.0, 0.005, 1.0))
        try:
            ticket = door.enter(owner, dice.choice((0, 1, 1, 2, 9)), deadline)
        except ApiError:
            return
        try:
            if ticket.is_waiting:
                await ticket.wait()
            assert ticket.done or door.in_flight
            await asyncio.sleep(dice.random() / 500)
        except ApiError:
            pass
        finally:
            ticket.release(dice.randrange(3))

    async def main() -> None:
        door = Door(Rig(max_queue=dice.randrange(6)))
        tasks = []
        for _ in range(40):
            tasks.append(asyncio.create_task(request(door)))
            if dice.random() < 0.3:
                await asyncio.sleep(dice.random() / 1000)
            if dice.random() < 0.2:
                dice.choice(tasks).cancel()
            if dice.random() < 0.1:
                door.becomes(dice.choice((EngineState.READY, EngineState.BACKOFF)))
            if dice.random() < 0.1:
                door.admission.hold(door.rig, closed=dice.random() < 0.5)
            if dice.random() < 0.05:
                door.admission.load_failed(door.rig, "dice")
        door.becomes(EngineState.READY)
        door.admission.hold(door.rig, closed=False)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert (door.in_flight, door.waiting) == (0, 0)
        assert not door.enter(units=CAPACITY).is_waiting
        assert not door.enter(a_tenant(priority="batch"), units=0).is_waiting

    simulate(main())


def test_shares_of_tenants_follow_their_weights() -> None:
    async def main() -> None:
        door = Door()
        served: Counter[str] = Counter()
        queue = [
            (tenant, door.enter(a_tenant(tenant, weight)))
            for _ in range(60)
            for tenant, weight in (("light", 1.0), ("heavy", 3.0))
        ]
        for _ in range(60):
            running = [(t, k) for t, k in queue if not k.is_waiting and not k.done]
            running[0][1].release(100)
            served[running[0][0]] += 1
        assert 2.3 < served["heavy"] / served["light"] < 3.9

    simulate(main())


@pytest.mark.parametrize("load", [1.5, 10])
def test_what_a_refusal_says_is_how_long_it_would_have_taken(load: float) -> None:
    """Requests of all lengths, at four slots that can do 8 a second: one that is refused waits all the same."""
    dice = random.Random(7)

    async def main() -> None:
        door, slots, loop = (
            Door(Rig(max_queue=40)),
            asyncio.Semaphore(4),
            asyncio.get_running_loop(),
        )
        told: list[tuple[int, float]] = []

        async def request(*, is_refused: bool) -> None:
            estimate = door.refusal(deadline=0.1).retry_after_seconds if is_refused else None
            began_at, ticket = loop.time(), door.enter()
            if ticket.is_waiting:
                await ticket.wait()
            if estimate is not None:
                told.append((estimate, loop.time() - began_at))
            async with slots:
                await asyncio.sleep(dice.uniform(0.1, 0.9))
            ticket.release(10)

        async with asyncio.TaskGroup() as group:
            while loop.time() < 60:
                await asyncio.sleep(dice.expovariate(8 * load))
                if door.waiting < 40:
                    is_known = loop.time() > 3 and door.waiting > 4
                    is_refused = is_known and dice.random() < 0.2
                    group.create_task(request(is_refused=is_refused))
        assert len(told) > 50
        for estimate, waited in told:
            # It is told in whole seconds, rounded up.
            assert 0.75 * waited - 0.5 <= estimate <= 1.35 * waited + 1.5

    simulate(main())


@pytest.mark.parametrize(("deadline", "max_queue"), [(0.3, 256), (None, 32)])
def test_overload_leaves_the_goodput_where_it_was(deadline: float | None, max_queue: int) -> None:
    """Ten times what an engine can do is offered; what counts is answers whose start was in time."""
    service_seconds, slo_seconds, lasts_seconds = 0.02, 0.3, 1.5

    async def goodput(factor: float) -> float:
        door = Door(Rig(max_queue=max_queue))
        good = 0
        loop = asyncio.get_running_loop()
        slots = asyncio.Semaphore(4)

        async def request(arrived_at: float) -> None:
            nonlocal good
            try:
                ticket = door.enter(deadline=deadline)
                if ticket.is_waiting:
                    try:
                        await ticket.wait()
                    except BaseException:
                        ticket.release()
                        raise
            except ApiError:
                return
            async with slots:
                await asyncio.sleep(service_seconds)
            ticket.release(10)
            good += loop.time() - arrived_at <= slo_seconds + 2 * service_seconds

        async with asyncio.TaskGroup() as group:
            began_at, sent = loop.time(), 0
            while (elapsed := loop.time() - began_at) < lasts_seconds:
                while sent < elapsed * factor * 4 / service_seconds:
                    group.create_task(request(loop.time()))
                    sent += 1
                await asyncio.sleep(0.002)
        return good / (loop.time() - began_at)

    async def main() -> None:
        peak = max(await goodput(0.9), await goodput(1.0))
        assert await goodput(10) >= 0.9 * peak

    simulate(main())
