"""Which models are loaded: on demand, in turns where there is not room for all, and for how long.

Requests wait in the gateway's queues, by model. A model that has room takes all of its own before it makes
way, so that few turns serve many requests: A B A A C A B C, with room for one, is served A A A A B B C C.
When a request's patience is at an end, those in the way take no more requests until its model is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from serving.engines.supervisor import Engine, EngineStartError, EngineState, NoRoomError
from serving.gateway.admission import Admission
from serving.gateway.fleet import Fleet

_log = logging.getLogger(__name__)

# Memory becomes free also without a word to us: other programs give it back.
_LOOK_AGAIN_SECONDS = 2.0

# Which engines would leave for another, of those that may; None while there is no place for it.
Room = Callable[[str, Callable[[str], bool]], Collection[str] | None]


@dataclass(frozen=True, slots=True)
class Standing:
    """A model as the policy sees it. Moments are of one clock, ``math.inf`` where there is none.

    ``is_loaded`` holds from when its load has begun until it is told to go, ``is_claiming`` while its load
    knows what it needs and has not been given a place yet. ``owes`` holds while some
    wait who did so when it became ready: then it has had no full turn yet. ``due_at`` is when the patience
    of one of those who wait for it ends; ``busy`` are its requests in flight.
    """

    id: str
    is_loaded: bool = False
    is_claiming: bool = False
    is_ready: bool = False
    busy: int = 0
    waiting: int = 0
    oldest_at: float = math.inf
    due_at: float = math.inf
    owes: bool = False
    ready_at: float = -math.inf
    idle_since: float = math.inf
    pinned: bool = False
    ttl_seconds: float | None = None
    retry_at: float = -math.inf


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and when to look again. ``closed`` models let no requests through to their engines."""

    load: tuple[str, ...] = ()
    unload: tuple[str, ...] = ()
    closed: frozenset[str] = frozenset()
    again_at: float = math.inf


class Policy:
    """Decides; others act. It remembers whom it makes room for, and who is to leave."""

    def __init__(self) -> None:
        self._head: str | None = None
        self._leaving: frozenset[str] = frozenset()

    @property
    def leaving(self) -> frozenset[str]:
        """Models that are to make way although requests wait for them."""
        return self._leaving

    def decide(
        self, now: float, standings: Sequence[Standing], room: Room, max_wait_seconds: float
    ) -> Decision:
        """What to do. A full turn lasts ``max_wait_seconds`` at most."""
        by_id = {each.id: each for each in standings}
        wanted = sorted(
            (s for s in standings if s.waiting and not s.is_loaded and now >= s.retry_at),
            key=lambda s: (s.due_at, s.oldest_at),
        )
        self._forget(by_id, wanted)
        load: list[str] = []
        # What one that claims its place will take is not to be seen yet; it tells within milliseconds.
        is_settled = not any(each.is_claiming for each in standings)
        for model in wanted if is_settled else ():
            leave = room(model.id, lambda other: self.may_leave(by_id[other]))
            if leave is not None:
                load.append(model.id)
                # Whoever comes after it sees who has left.
                if leave:
                    break
            elif model.due_at <= now:
                self._make_room(now, model, by_id, room, max_wait_seconds)
                # Nobody else takes the room that becomes free for it.
                break
        unload = [s.id for s in standings if _is_expired(s, now)]
        moments = [
            moment
            for s in standings
            for moment in (s.due_at, s.retry_at, _expiry(s), s.ready_at + max_wait_seconds)
            if moment > now
        ]
        if wanted:
            moments.append(now + _LOOK_AGAIN_SECONDS)
        return Decision(tuple(load), tuple(unload), self._leaving, min(moments, default=math.inf))

    def may_leave(self, model: Standing) -> bool:
        """Whether a model may make way now: it has nothing to do, or was told to finish."""
        is_wanted = model.waiting and model.id not in self._leaving
        return model.is_ready and not model.pinned and not model.busy and not is_wanted

    def _forget(self, by_id: dict[str, Standing], wanted: Collection[Standing]) -> None:
        """Once its model has its place, or nobody wants it any more, none need leave."""
        head = by_id.get(self._head or "")
        if head is None or not (head.is_claiming or head in wanted):
            self._head, self._leaving = None, frozenset()
        self._leaving = frozenset(
            each for each in self._leaving if each in by_id and by_id[each].is_loaded
        )

    def _make_room(
        self,
        now: float,
        model: Standing,
        by_id: dict[str, Standing],
        room: Room,
        max_wait_seconds: float,
    ) -> None:
        """Choose who is to leave, and keep to the choice: all of them end what they work on at about the same time."""
        if self._head == model.id and self._leaving:
            return

        def could_leave(other: str) -> bool:
            rival = by_id[other]
            had_turn = not rival.owes or now >= rival.ready_at + max_wait_seconds
            return rival.is_ready and not rival.pinned and had_turn

        leave = room(model.id, could_leave)
        self._head, self._leaving = model.id, frozenset(leave or ())


def _expiry(model: Standing) -> float:
    if model.ttl_seconds is None or not model.is_ready or model.busy or model.waiting:
        return math.inf
    return math.inf if model.pinned else model.idle_since + model.ttl_seconds


def _is_expired(model: Standing, now: float) -> bool:
    return _expiry(model) <= now


class Swapper:
    """Has the fleet do what the policy decides."""

    def __init__(
        self, fleet: Fleet, admission: Admission, max_wait_seconds: Callable[[], float]
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._max_wait_seconds = max_wait_seconds
        self._policy = Policy()
        self._again = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ready_at: dict[str, float] = {}
        self._retry_at: dict[str, float] = {}
        fleet.subscribe(self._changed)
        fleet.traffic(admission.last_used, admission.in_flight)
        admission.listen(self._again.set)

    async def run(self) -> None:
        """Load and unload models until cancelled."""
        try:
            while True:
                self._again.clear()
                again_at = self._step()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, again_at - self._admission.monotonic())):
                        await self._again.wait()
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _changed(self, engine: Engine) -> None:
        if engine.state is EngineState.READY:
            self._ready_at[engine.id] = self._admission.monotonic()
            self._retry_at.pop(engine.id, None)
        elif engine.state is EngineState.STOPPED:
            self._ready_at.pop(engine.id, None)
            self._retry_at.pop(engine.id, None)
        self._admission.changed(engine)
        self._again.set()

    def _step(self) -> float:
        engines = {engine.id: engine for engine in self._fleet.engines}

        def room(wanted: str, may_leave: Callable[[str], bool]) -> Collection[str] | None:
            engine = engines[wanted]
            if engine.footprint is None:
                return ()  # its load finds out
            try:
                plan = self._fleet.plan(engine, lambda other: may_leave(other.id))
            except NoRoomError:
                return ()  # its load says why
            return None if plan is None else plan.leave

        decision = self._policy.decide(
            self._admission.monotonic(),
            [self._standing(engine) for engine in engines.values()],
            room,
            self._max_wait_seconds(),
        )
        for engine in engines.values():
            self._admission.hold(engine, closed=engine.id in decision.closed)
        for each in decision.load:
            self._begin(each, self._load(engines[each]))
        for each in decision.unload:
            self._begin(each, self._unload(engines[each]))
        return decision.again_at

    def _standing(self, engine: Engine) -> Standing:
        admission, model = self._admission, engine.model
        demand = admission.demand(engine, self._max_wait_seconds())
        ready_at = self._ready_at.get(engine.id, -math.inf)
        is_ready = engine.state is EngineState.READY and engine.id not in self._tasks
        is_preparing = engine.state is EngineState.PREPARING
        return Standing(
            id=engine.id,
            is_loaded=is_preparing
            or engine.is_loaded
            or engine.id in self._tasks
            or engine.state is EngineState.STOPPED,
            is_claiming=(is_preparing or engine.id in self._tasks)
            and engine.footprint is not None
            and (not engine.shares_mib or engine.state is EngineState.ASLEEP),
            is_ready=is_ready or engine.state is EngineState.BACKOFF,
            busy=admission.in_flight(engine),
            waiting=demand.waiting,
            oldest_at=demand.oldest_at,
            due_at=demand.due_at,
            owes=admission.owes(engine),
            ready_at=ready_at,
            idle_since=max(admission.last_used(engine), ready_at),
            pinned=model.pinned,
            ttl_seconds=model.ttl_seconds,
            retry_at=self._retry_at.get(engine.id, -math.inf),
        )

    def _begin(self, engine_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[engine_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            del self._tasks[engine_id]
            self._again.set()

        task.add_done_callback(ended)

    async def _load(self, engine: Engine) -> None:
        def may_leave(other: Engine) -> bool:
            return self._policy.may_leave(self._standing(other))

        try:
            await self._fleet.load(engine, may_leave)
        except NoRoomError as error:
            if error.is_final:
                self._failed(engine, error)
            else:
                # Between the decision and the reservation somebody else took it.
                self._retry_at[engine.id] = self._admission.monotonic() + 0.1
        except EngineStartError as error:
            # One that was unloaded meanwhile has not failed.
            if engine.failure is not None:
                self._failed(engine, error)

    async def _unload(self, engine: Engine) -> None:
        if not self._admission.in_flight(engine) and not self._admission.waiting(engine):
            _log.info("%s: unloaded, unused for %g s", engine.model.name, engine.model.ttl_seconds)
            await self._fleet.unload(engine)

    def _failed(self, engine: Engine, error: EngineStartError) -> None:
        _log.error("%s", error)
        # The process's lines are for the operator; they may name files.
        reason = str(error) if isinstance(error, NoRoomError) else "its engine does not start"
        self._retry_at[engine.id] = self._admission.load_failed(engine, reason)
