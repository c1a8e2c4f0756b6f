"""Which models are loaded when: the policy under simulated time, with a simulated fleet."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gateway.swapping import Decision, Policy, Standing

MAX_WAIT_SECONDS = 20.0
# From the decision to load a model until its place is set aside: what its engines hold is measured before.
CLAIM_SECONDS = 0.01


@dataclass
class Model:
    """A simulated engine: its size, what it does, and what waits for it."""

    name: str
    size: int = 1
    slots: int = 2
    group: str | None = None
    pinned: bool = False
    ttl_seconds: float | None = None
    load_seconds: float = 3.0
    state: str = "unloaded"
    closed: bool = False
    busy: int = 0
    waiting: deque[tuple[int, float, float]] = field(default_factory=deque)
    ready_at: float = -math.inf
    last_used: float = 0.0
    owed: frozenset[int] = frozenset()


class Fleet:
    """Engines of some sizes in a room of a size, driven by the policy. Time passes from event to event."""

    def __init__(self, models: list[Model], room: int) -> None:
        self.models = {model.name: model for model in models}
        self.room = room
        self.policy = Policy()
        self.now = 0.0
        self.served: list[str] = []
        self.waits: dict[int, float] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), event))

    def ask(self, moment: float, name: str, service_seconds: float = 1.0) -> int:
        number = next(self._numbers)
        model = self.models[name]
        self.at(moment, lambda: model.waiting.append((number, moment, service_seconds)))
        return number

    def run(self, until: float = math.inf) -> None:
        steps = 0
        while self._events and self._events[0][0] <= until:
            steps += 1
            assert steps < 100_000, "it goes in circles"
            self.now = max(self.now, self._events[0][0])
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self._act()

    def _act(self) -> None:
        self._pump()
        decision = self._decide()
        for model in self.models.values():
            model.closed = model.name in decision.closed
        for name in decision.load:
            self._load(self.models[name])
        for name in decision.unload:
            self._unload(self.models[name])
        self._pump()
        if decision.again_at < math.inf:
            self.at(decision.again_at, lambda: None)

    def _decide(self) -> Decision:
        return self.policy.decide(
            self.now,
            [self._standing(m) for m in self.models.values()],
            self._room,
            MAX_WAIT_SECONDS,
        )

    def _standing(self, model: Model) -> Standing:
        oldest = min((arrived for _, arrived, _ in model.waiting), default=math.inf)
        return Standing(
            id=model.name,
            is_loaded=model.state in ("claiming", "loading", "ready"),
            is_claiming=model.state == "claiming",
            is_ready=model.state == "ready",
            busy=model.busy,
            waiting=len(model.waiting),
            oldest_at=oldest,
            due_at=oldest + MAX_WAIT_SECONDS,
            owes=any(number in model.owed for number, _, _ in model.waiting),
            ready_at=model.ready_at,
            idle_since=max(model.last_used, model.ready_at),
            pinned=model.pinned,
            ttl_seconds=model.ttl_seconds,
        )

    def _room(self, name: str, may_leave: Callable[[str], bool]) -> Collection[str] | None:
        model = self.models[name]
        loaded = [
            m for m in self.models.values() if m.state in ("loading", "ready") and m is not model
        ]
        rivals = [m for m in loaded if m.group is not None and m.group == model.group]
        if not all(may_leave(m.name) for m in rivals):
            return None
        leave = list(rivals)
        for other in sorted((m for m in loaded if m not in rivals), key=lambda m: m.last_used):
            if self._fits(model, loaded, leave):
                break
            if may_leave(other.name):
                leave.append(other)
        return [m.name for m in leave] if self._fits(model, loaded, leave) else None

    def _fits(self, model: Model, loaded: list[Model], leave: list[Model]) -> bool:
        return model.size + sum(m.size for m in loaded if m not in leave) <= self.room

    def _load(self, model: Model) -> None:
        assert model.state == "unloaded", "no double load"
        model.state = "claiming"
        # Its engine has changed its state: another decision.
        self.at(self.now + CLAIM_SECONDS / 2, lambda: None)
        self.at(self.now + CLAIM_SECONDS, lambda: self._claim(model))

    def _claim(self, model: Model) -> None:
        leave = self._room(
            model.name, lambda other: self.policy.may_leave(self._standing(self.models[other]))
        )
        if leave is None:
            model.state = "unloaded"
            return  # two were decided at once, for one room
        for name in leave:
            self._unload(self.models[name])
        model.state = "loading"
        self.loads.append(model.name)
        self.at(self.now + model.load_seconds, lambda: self._ready(model))

    def _ready(self, model: Model) -> None:
        model.state, model.ready_at = "ready", self.now
        model.owed = frozenset(number for number, _, _ in model.waiting)

    def _unload(self, model: Model) -> None:
        assert model.state == "ready"
        assert not model.busy, "never one with requests in flight"
        assert not model.pinned
        model.state = "unloaded"
        self.unloads.append(model.name)

    def _pump(self) -> None:
        for model in self.models.values():
            while model.state == "ready" and not model.closed and model.waiting:
                if model.busy >= model.slots:
                    break
                number, arrived, seconds = model.waiting.popleft()
                self.waits[number] = self.now - arrived
                self.served.append(model.name)
                model.busy += 1
                model.last_used = self.now
                self.at(self.now + seconds, lambda model=model: self._end(model))  # type: ignore[misc]

    def _end(self, model: Model) -> None:
        model.busy -= 1
        model.last_used = self.now


def models(names: str, **options: object) -> list[Model]:
    return [replace(Model(name), waiting=deque(), **options) for name in names]  # type: ignore[arg-type]


def test_requests_are_gathered_by_model() -> None:
    fleet = Fleet(models("ABC"), room=1)
    for number, name in enumerate("ABAACABC"):
        fleet.ask(number / 1000, name)
    fleet.run()
    assert "".join(fleet.served) == "AAAABBCC"
    assert fleet.loads == ["A", "B", "C"]


def test_nobody_waits_for_ever_behind_a_busy_model() -> None:
    fleet = Fleet(models("AB"), room=1)
    for number in range(1000):
        fleet.ask(number / 4, "A")
    patient = fleet.ask(10.0, "B")
    fleet.run()
    # Its patience, what A works on, its claim, and the load.
    assert fleet.waits[patient] <= MAX_WAIT_SECONDS + 1.0 + CLAIM_SECONDS + 3.0
    assert len(fleet.waits) == 1001
    assert len(fleet.loads) <= 4


def test_the_pinned_and_the_busy_stay_and_the_least_recently_used_leaves() -> None:
    fleet = Fleet(models("PABC"), room=3)
    fleet.models["P"].pinned = True
    fleet.ask(0, "P")
    fleet.ask(10, "A")
    fleet.ask(20, "B")
    fleet.ask(30, "A", service_seconds=100.0)
    fleet.ask(40, "C")
    fleet.run()
    assert fleet.unloads == ["B"]


def test_models_of_a_group_take_turns() -> None:
    fleet = Fleet(models("AB", group="one"), room=5)
    for number, name in enumerate("ABAB"):
        fleet.ask(number / 1000, name)
    fleet.run()
    assert "".join(fleet.served) == "AABB"


def test_a_big_model_is_not_starved_by_small_ones_that_fit() -> None:
    big = Model("X", size=4)
    fleet = Fleet([*models("ABCDEF"), big], room=4)
    for number in range(600):
        fleet.ask(number / 4, "ABCDEF"[number % 6])
    fleet.ask(5.0, "X")
    fleet.run()
    assert "X" in fleet.served
    first = next(number for number, name in enumerate(fleet.served) if name == "X")
    assert first < 200


def test_models_are_unloaded_after_their_ttl_and_not_before() -> None:
    fleet = Fleet(models("A", ttl_seconds=50.0), room=1)
    fleet.ask(0, "A")
    fleet.ask(40, "A")
    fleet.run(until=90)
    assert fleet.models["A"].state == "ready"
    fleet.run(until=92)
    assert fleet.models["A"].state == "unloaded"


def test_overload_of_all_models_does_not_thrash() -> None:
    """Twice what two models could do by turns: each turn serves many."""
    fleet = Fleet(models("AB"), room=1)
    for number in range(2000):
        fleet.ask(number / 4, "AB"[number % 2])
    fleet.run()
    assert len(fleet.waits) == 2000
    assert len(fleet.served) / len(fleet.loads) > 40


REQUESTS = st.lists(
    st.tuples(st.floats(0, 120), st.integers(0, 4), st.floats(0.01, 30.0)), min_size=1, max_size=80
)
MODELS = st.lists(
    st.tuples(st.integers(1, 3), st.sampled_from((None, None, "g")), st.sampled_from((None, 5.0))),
    min_size=5,
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(REQUESTS, MODELS, st.integers(3, 6))
def test_everybody_is_served_and_nobody_starves(
    requests: list[tuple[float, int, float]],
    kinds: list[tuple[int, str | None, float | None]],
    room: int,
) -> None:
    fleet = Fleet(
        [
            Model("ABCDE"[number], size, group=group, ttl_seconds=ttl)
            for number, (size, group, ttl) in enumerate(kinds)
        ],
        room,
    )
    for moment, number, seconds in requests:
        fleet.ask(moment, "ABCDE"[number], seconds)
    fleet.run()
    assert len(fleet.waits) == len(requests)
    # A turn for each other model, with its requests, its load, and its patience; and what is ahead in one's own.
    longest = sum(seconds for _, _, seconds in requests) + 10 * (MAX_WAIT_SECONDS + 3 + 30)
    assert max(fleet.waits.values()) <= longest
    # A model is loaded for requests alone, for at least one at a time.
    assert len(fleet.loads) <= len(requests)
