"""Who may go to an engine now, and who waits: a bounded, fair queue for each, in the gateway.

An engine gets what it can work on and a little more, so that its own scheduler always has its next ones.
The rest waits here, where it can be refused early, leave at once when its client does, and wait for an
engine that is not loaded yet.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from serving.engines.supervisor import Engine, EngineState
from serving.fairness import FairQueue
from serving.gateway.routing import Backend, endpoint_of
from serving.gateway.wires import wire_of
from serving.metrics import Metrics
from serving.protocol.errors import ApiError
from serving.protocol.tenancy import Priority, Tenancy

# How much of a mean each new sample makes up. The first ten count alike: those that end first are the short ones.
_NEWEST_SHARE = 0.1
_LONGEST_BACKOFF_SECONDS = 60.0


class _Stage(Enum):
    """A ticket's life: WAITING → RUNNING → DONE, or from WAITING to DONE."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


class Ticket:
    """A request's place: it waits, is let through, and must be given back with :meth:`release`."""

    __slots__ = (
        "_line",
        "adapter",
        "arrived_at",
        "deadline_at",
        "error",
        "owner",
        "remaining",
        "settled",
        "stage",
        "started_at",
        "tokens",
        "units",
    )

    def __init__(
        self, line: _Line, owner: Tenancy, units: int, arrived_at: float, deadline_at: float
    ) -> None:
        self.owner = owner
        # About how many the request will take, for those who compare loads.
        self.tokens = 0
        # The LoRA adapter that it asks for.
        self.adapter: str | None = None
        # Slots of the engine that it takes; 0 for what takes none.
        self.units = units
        # Tokens that it is expected to take, until that is known.
        self.remaining = max(1, round(units * line.mean_tokens))
        self.stage = _Stage.WAITING
        self.arrived_at = arrived_at
        self.started_at: float | None = None
        self.deadline_at = deadline_at
        # Made for those who really wait: done when they need wait no more, for good or ill.
        self.settled: asyncio.Future[None] | None = None
        self.error: ApiError | None = None
        self._line = line

    @property
    def is_starting(self) -> bool:
        """Once let through, it is the engine's to share."""
        return False

    @property
    def done(self) -> bool:
        """Whether it has been given back."""
        return self.stage is _Stage.DONE

    @property
    def queue_seconds(self) -> float:
        """How long it waited."""
        return (self.started_at or self.arrived_at) - self.arrived_at

    @property
    def is_waiting(self) -> bool:
        """Whether it has yet to be let through."""
        return self.stage is _Stage.WAITING

    async def wait(self) -> None:
        """Until it is let through; raises :class:`ApiError` (503) if that is not in time, or never."""
        await self._line.wait(self)

    def release(self, tokens: int = 0) -> None:
        """The request has ended, and used so many tokens, or waits no more. Told again, it changes nothing."""
        self._line.release(self, tokens)


@dataclass(frozen=True, slots=True)
class Demand:
    """What waits for an engine: how many, since when, and when the most impatient one's turn is due."""

    waiting: int
    oldest_at: float = math.inf
    due_at: float = math.inf


class Admission:
    """The queues of all engines. In one event loop; moments are ``time.monotonic()``."""

    def __init__(
        self, metrics: Metrics, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics = metrics
        self.monotonic = monotonic
        self._lines: dict[str, _Line] = {}
        self._listeners: list[Callable[[], None]] = []

    def listen(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when an engine begins to be wanted, or becomes idle."""
        self._listeners.append(listener)

    def enter(
        self,
        engine: Backend,
        owner: Tenancy,
        units: int,
        deadline_seconds: float | None = None,
        tokens: int = 0,
        adapter: str | None = None,
    ) -> Ticket:
        """A ticket that is let through to its engine, which takes requests then, or waits in its queue.

        It takes ``units`` of the engine's slots, is expected to take so many ``tokens``, asks for an ``adapter`` if
        it does, and must start within ``deadline_seconds``; None is the model's ``queue_timeout_seconds``. Raises :class:`ApiError` (503, with a ``Retry-After``) if it can
        do neither. Whatever comes of it, it must be released.
        """
        if engine.state is EngineState.STOPPED:
            endpoint_of(engine)  # says so: nobody will load it any more
        line = self._line(engine)
        ticket = line.pass_through(owner, units, deadline_seconds) or line.queue(
            owner, units, deadline_seconds
        )
        ticket.tokens, ticket.adapter = tokens, adapter
        line.outstanding_tokens += tokens
        if adapter is not None:
            line.by_adapter[adapter].add(ticket)
        return ticket

    def in_flight(self, engine: Backend) -> int:
        """Requests that an engine works on, and those about to be sent."""
        line = self._lines.get(engine.id)
        return line.requests if line else 0

    def waiting(self, engine: Backend) -> int:
        """Requests that wait here for an engine."""
        return self.demand(engine).waiting

    def requests_with(self, engine: Backend, adapter: str) -> int:
        """Requests for an adapter that an engine works on, or that wait here for it."""
        line = self._lines.get(engine.id)
        return len(line.by_adapter[adapter]) if line else 0

    def oldest_with(self, engine: Backend, adapter: str) -> float:
        """When the oldest of an adapter's requests in flight was let through to its engine; infinity if none is."""
        line = self._lines.get(engine.id)
        tickets = line.by_adapter[adapter] if line else ()
        return min((t.started_at for t in tickets if t.started_at is not None), default=math.inf)

    def outstanding_tokens(self, engine: Backend) -> int:
        """Tokens that an engine's requests, here and there, are expected to take."""
        line = self._lines.get(engine.id)
        return line.outstanding_tokens if line else 0

    def forget(self, engine: Backend) -> None:
        """An engine without a life of its own, a remote, gets no new requests; those it has go on."""
        self._lines.pop(engine.id, None)

    def last_used(self, engine: Backend) -> float:
        """When an engine last had a request; 0 if never."""
        line = self._lines.get(engine.id)
        return line.last_used if line else 0.0

    def demand(self, engine: Backend, patience_seconds: float = math.inf) -> Demand:
        """What waits for an engine. A turn is due after ``patience_seconds``, or half-way to the deadline."""
        line = self._lines.get(engine.id)
        return line.demand(patience_seconds) if line else Demand(0)

    def hold(self, engine: Backend, *, closed: bool) -> None:
        """Let nobody through to an engine for a while, so that it becomes idle; or let them through again."""
        line = self._line(engine) if closed else self._lines.get(engine.id)
        if line is not None and line.closed != closed:
            line.closed = closed
            line.pump()

    def owes(self, engine: Backend) -> bool:
        """Whether some of those that waited when an engine became ready still do."""
        line = self._lines.get(engine.id)
        return bool(line and any(t.is_waiting for t in line.owed))

    def changed(self, engine: Backend) -> None:
        """An engine's state has changed."""
        line = self._lines.get(engine.id)
        if engine.state is EngineState.STOPPED:
            if line is not None:
                line.fail(
                    ApiError(
                        503, "The server is shutting down.", code="draining", retry_after_seconds=5
                    )
                )
                del self._lines[engine.id]
        elif engine.state is EngineState.READY:
            line = self._line(engine)
            line.owed = line.tickets()
            line.failures, line.retry_at = 0, 0.0
            line.pump()

    def load_failed(self, engine: Backend, message: str) -> float:
        """Refuse all that wait for an engine that cannot be loaded, and new ones for a while; gives until when."""
        line = self._line(engine)
        line.failures += 1
        backoff_seconds = min(2.0 ** (line.failures - 1), _LONGEST_BACKOFF_SECONDS)
        line.retry_at = self.monotonic() + backoff_seconds
        line.failure = message
        line.fail(line.load_error())
        return line.retry_at

    def tell(self) -> None:
        """Tell those who listen."""
        for listener in self._listeners:
            listener()

    def publish(self) -> None:
        """Bring the gauges of what waits up to date."""
        gauge = self.metrics.admission_waiting
        gauge.clear()
        for line in self._lines.values():
            for priority, waiting in line.waiting_by_class().items():
                # Two engines share a name while a reload lasts.
                gauge.labels(line.engine.model.served_name, priority).inc(waiting)

    def _line(self, engine: Backend) -> _Line:
        line = self._lines.get(engine.id)
        if line is None:
            line = self._lines[engine.id] = _Line(self, engine)
        return line


class _Line:
    """One engine's queue, what it works on, and how long that takes."""

    def __init__(self, admission: Admission, engine: Backend) -> None:
        self.engine = engine
        self.requests = 0
        self.outstanding_tokens = 0
        self.by_adapter = defaultdict[str, set[Ticket]](set)
        self.last_used = 0.0
        self.closed = False
        self.owed: list[Ticket] = []
        self.failures = 0
        self.failure = ""
        self.retry_at = 0.0
        # Moving means: tokens of a unit, and seconds for which it takes its place.
        self.mean_tokens = 1.0
        self._mean_seconds = 0.0
        self._samples = 0
        self._admission = admission
        self._queue: FairQueue[Ticket] = FairQueue()
        # What takes no slot waits for the engine alone.
        self._unqueued: list[Ticket] = []
        self._units: dict[Priority, int] = {"interactive": 0, "batch": 0}

    @property
    def capacity(self) -> int:
        """Units that the engine is given at a time: its slots, and what follows next.

        One that does not tell how long requests wait for a slot of its gets no more than it has slots for.
        """
        slots = self.engine.model.max_sequences
        if isinstance(self.engine, Engine) and not wire_of(self.engine.model).has_queue:
            return slots
        return slots + -(-slots // 4)

    @property
    def is_open(self) -> bool:
        """Whether the engine takes requests."""
        return self.engine.endpoint is not None and not self.closed

    def pass_through(
        self, owner: Tenancy, units: int, deadline_seconds: float | None
    ) -> Ticket | None:
        """A ticket that is let through at once; None if it cannot be."""
        if not self.is_open or (units and self._waiting_beside(owner)):
            return None
        ticket = self._ticket(owner, units, deadline_seconds)
        if units:
            if not self._fits(ticket):
                return None
            self._queue.push(ticket)
            self._queue.pop()
        self._start(ticket)
        return ticket

    def queue(self, owner: Tenancy, units: int, deadline_seconds: float | None) -> Ticket:
        """A ticket that waits; raises :class:`ApiError` if it may not."""
        if self._admission.monotonic() < self.retry_at:
            raise self._refused(self.load_error())
        ticket = self._ticket(owner, units, deadline_seconds)
        ticket.settled = asyncio.get_running_loop().create_future()
        if ticket.deadline_at <= ticket.arrived_at:
            if self.engine.endpoint is None:
                endpoint_of(self.engine)  # says what it does instead
            raise self._refused(self._late(owner, units))
        if units:
            self._make_place(ticket)
            self._queue.push(ticket)
        else:
            self._unqueued.append(ticket)
        if not self.is_open:
            self._admission.tell()
        return ticket

    def _ticket(self, owner: Tenancy, units: int, deadline_seconds: float | None) -> Ticket:
        now = self._admission.monotonic()
        longest = self.engine.model.queue_timeout_seconds
        seconds = longest if deadline_seconds is None else min(deadline_seconds, longest)
        return Ticket(self, owner, units, now, now + seconds)

    async def wait(self, ticket: Ticket) -> None:
        """As :meth:`Ticket.wait`."""
        assert ticket.settled is not None
        seconds = ticket.deadline_at - ticket.arrived_at
        try:
            async with asyncio.timeout(seconds):
                await ticket.settled
        except TimeoutError:
            if ticket.is_waiting:
                self._leave(ticket)
                ticket.error = self._refused(self._late(ticket.owner, ticket.units))
        if ticket.error is not None:
            raise ticket.error

    def release(self, ticket: Ticket, tokens: int) -> None:
        """As :meth:`Ticket.release`."""
        if ticket.is_waiting:
            self._leave(ticket)
        if ticket.done:
            return
        self._end(ticket)
        now = self._admission.monotonic()
        self.requests -= 1
        self.last_used = now
        if ticket.units:
            self._units[ticket.owner.priority] -= self._size(ticket)
            if tokens:
                owner = ticket.owner
                self._queue.charge(owner.tenant, owner.weight, tokens, owner.priority)
                assert ticket.started_at is not None
                seconds = now - ticket.started_at
                self._samples += 1
                share = max(_NEWEST_SHARE, 1 / self._samples)
                self._mean_seconds = _mean(self._mean_seconds, seconds, share)
                self.mean_tokens = _mean(self.mean_tokens, tokens / ticket.units, share)
        self.pump()
        if not self.requests:
            self._admission.tell()

    def pump(self) -> None:
        """Let through whom the engine has room for."""
        if not self.is_open:
            return
        for ticket in self._unqueued:
            self._grant(ticket)
        self._unqueued.clear()
        while (first := self._queue.peek()) is not None and self._fits(first):
            self._grant(self._queue.pop())

    def fail(self, error: ApiError) -> None:
        """Refuse all that wait."""
        for ticket in self.tickets():
            self._evict(ticket, error)

    def tickets(self) -> list[Ticket]:
        """All that wait."""
        return [*self._unqueued, *self._queue]

    def demand(self, patience_seconds: float) -> Demand:
        """As :meth:`Admission.demand`."""
        tickets = self.tickets()
        if not tickets:
            return Demand(0)
        return Demand(
            len(tickets),
            min(ticket.arrived_at for ticket in tickets),
            min(
                min(t.arrived_at + patience_seconds, (t.arrived_at + t.deadline_at) / 2)
                for t in tickets
            ),
        )

    def waiting_by_class(self) -> dict[str, int]:
        """How many wait in the queue."""
        return self._queue.waiting()

    def load_error(self) -> ApiError:
        """What is told about an engine that could not be loaded."""
        seconds = self.retry_at - self._admission.monotonic()
        return ApiError(
            503,
            f"The model '{self.engine.model.served_name}' cannot be loaded: {self.failure}",
            code="model_load_failed",
            retry_after_seconds=max(1, math.ceil(seconds)),
        )

    def _size(self, ticket: Ticket) -> int:
        # One that is larger than the engine goes alone.
        return min(ticket.units, self.capacity)

    def _fits(self, ticket: Ticket) -> bool:
        """Whether there is room for it. The batch class gives way: what it takes does not count for others."""
        taken = self._units["interactive"]
        if ticket.owner.priority == "batch":
            taken += self._units["batch"]
        return not taken or taken + self._size(ticket) <= self.capacity

    def _waiting_beside(self, owner: Tenancy) -> int:
        """How many wait that do not give way to the owner's."""
        waiting = self._queue.waiting()
        return waiting["interactive"] + (waiting["batch"] if owner.priority == "batch" else 0)

    def _make_place(self, ticket: Ticket) -> None:
        """Raise :class:`ApiError` unless a ticket may wait: its place is another's where that one has too many."""
        beside = self._waiting_beside(ticket.owner)
        # Who waits for the engine itself would otherwise have gone to it.
        places = self.engine.model.max_queue + (0 if self.is_open else self.capacity)
        if beside >= places:
            longest = self._queue.longest_line(ticket.owner.priority)
            own = (self._queue.waiting_of(ticket.owner) + 1) / ticket.owner.weight
            full = self._refusal(
                f"{beside} requests wait for the model '{self.engine.model.served_name}' already",
                "queue_full",
                self._seconds_until(ticket.owner, ticket.units),
            )
            if longest is None or own >= longest[0]:
                raise self._refused(full)
            self._evict(longest[1], full)
        seconds = self._seconds_until(ticket.owner, ticket.units)
        if ticket.arrived_at + seconds > ticket.deadline_at:
            raise self._refused(self._late(ticket.owner, ticket.units))

    def _seconds_until(self, owner: Tenancy, units: int) -> float:
        """How long a new request would wait, from how long requests take; 0 as long as that is not known."""
        ahead = sum(self._size(ticket) for ticket in self._queue.ahead_of(owner))
        # On average one place becomes free every mean_seconds / capacity.
        return (ahead + min(units, self.capacity)) * self._mean_seconds / self.capacity

    def _late(self, owner: Tenancy, units: int) -> ApiError:
        return self._refusal(
            f"The model '{self.engine.model.served_name}' cannot start on the request before its deadline",
            "deadline_unmeetable",
            self._seconds_until(owner, units),
        )

    def _refusal(self, what: str, code: str, seconds: float) -> ApiError:
        wait = max(1, math.ceil(seconds))
        return ApiError(503, f"{what}; try again in {wait} s.", code=code, retry_after_seconds=wait)

    def _refused(self, error: ApiError) -> ApiError:
        name = self.engine.model.served_name
        self._admission.metrics.admission_refusals.labels(name, str(error.code)).inc()
        return error

    def _start(self, ticket: Ticket) -> None:
        now = self._admission.monotonic()
        ticket.stage, ticket.started_at = _Stage.RUNNING, now
        self.requests += 1
        self.last_used = now
        if ticket.units:
            self._units[ticket.owner.priority] += self._size(ticket)
        self._admission.metrics.admission_wait.labels(self.engine.model.served_name).observe(
            ticket.queue_seconds
        )

    def _grant(self, ticket: Ticket) -> None:
        self._start(ticket)
        _settle(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Take a waiting ticket out, whose client has left or whose deadline is over."""
        self._take_out(ticket)
        # It may have been too large for the room that those behind it fit in.
        self.pump()

    def _take_out(self, ticket: Ticket) -> None:
        self._end(ticket)
        if ticket.units:
            self._queue.remove(ticket)
        else:
            self._unqueued.remove(ticket)

    def _end(self, ticket: Ticket) -> None:
        ticket.stage = _Stage.DONE
        self.outstanding_tokens -= ticket.tokens
        if ticket.adapter is not None:
            self.by_adapter[ticket.adapter].remove(ticket)

    def _evict(self, ticket: Ticket, error: ApiError) -> None:
        self._take_out(ticket)
        ticket.error = self._refused(error)
        _settle(ticket)


def _settle(ticket: Ticket) -> None:
    # Whoever has given up waiting has cancelled it.
    if ticket.settled is not None and not ticket.settled.done():
        ticket.settled.set_result(None)


def _mean(mean: float, sample: float, share: float) -> float:
    return mean + share * (sample - mean)
