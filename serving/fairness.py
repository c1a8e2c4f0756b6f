"""Who is served next, so that tenants share a model by weight, measured in tokens.

Every tenant has a clock in each priority class: the tokens computed for it, divided by its weight. The
tenant whose clock is furthest behind is next. One that comes back from idle starts with the others: it
is neither punished for what it used when nobody else wanted it, nor has it saved up credit ("virtual
token counters": Sheng et al., Fairness in Serving Large Language Models, OSDI 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from serving.protocol.tenancy import Priority


class Owner(Protocol):
    """For whom work is; a ``Tenancy`` is one."""

    @property
    def tenant(self) -> str:
        """Who shares, by name."""

    @property
    def weight(self) -> float:
        """The share, beside other tenants of the class."""

    @property
    def priority(self) -> Priority:
        """The class."""


class Work(Protocol):
    """What waits, is given out, and ends."""

    @property
    def owner(self) -> Owner:
        """For whom it is."""

    @property
    def remaining(self) -> int:
        """Tokens that are still to be computed and charged, as far as is known."""

    @property
    def is_starting(self) -> bool:
        """Whether, once given out, it could still use a larger share."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""


Item = TypeVar("Item", bound=Work)


@dataclass(slots=True)
class _Line(Generic[Item]):
    """A tenant's place in a class: what waits, what was given out and is not done, and the clock."""

    clock: float = 0.0
    waiting: deque[Item] = field(default_factory=deque)
    running: list[Item] = field(default_factory=list)
    last_turn: int = 0

    @property
    def is_present(self) -> bool:
        """Whether anything of it waits or runs."""
        return bool(self.waiting) or not all(s.done for s in self.running)

    @property
    def wants_more(self) -> bool:
        """Whether it could use a larger share than it has: something waits, or is starting."""
        return bool(self.waiting) or any(s.is_starting for s in self.running)

    @property
    def clock_to_be(self) -> float:
        """The clock once what is given out is computed: a burst takes no slots before it is charged."""
        return self.clock + sum(s.remaining / s.owner.weight for s in self.running if not s.done)


class FairQueue(Generic[Item]):
    """What waits; also the clocks by which those that run share a step.

    A class gives way to the one before it altogether. A tenant's own work keeps its order. One thread
    alone uses it, but for :meth:`waiting`.
    """

    def __init__(self) -> None:
        self._classes: dict[Priority, dict[str, _Line[Item]]] = {"interactive": {}, "batch": {}}
        self._waiting: dict[str, int] = {"interactive": 0, "batch": 0}
        self._turns = 0

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def __iter__(self) -> Iterator[Item]:
        for lines in self._classes.values():
            for line in lines.values():
                yield from line.waiting

    def waiting(self) -> dict[str, int]:
        """How many items wait, by class; any thread may ask."""
        return dict(self._waiting)

    def push(self, item: Item) -> None:
        """Queue an item behind those of its tenant."""
        self._join(item).waiting.append(item)
        self._waiting[item.owner.priority] += 1

    def push_front(self, item: Item) -> None:
        """Put an item that :meth:`pop` gave out back before those of its tenant."""
        line = self._join(item)
        if item in line.running:
            line.running.remove(item)
        line.last_turn = 0  # that turn does not count
        line.waiting.appendleft(item)
        self._waiting[item.owner.priority] += 1

    def peek(self, priority: Priority | None = None) -> Item | None:
        """What :meth:`pop` would give out, of one class or of all."""
        for lines in self._classes.values() if priority is None else (self._classes[priority],):
            candidates = [line for line in lines.values() if line.waiting]
            if candidates:
                # Among equals the one whose last turn is longest ago.
                line = min(candidates, key=lambda line: (line.clock_to_be, line.last_turn))
                return line.waiting[0]
        return None

    def pop(self) -> Item:
        """Give out the item that is next; IndexError if none waits."""
        item = self.peek()
        if item is None:
            raise IndexError("nothing waits")
        self.remove(item)
        line = self._classes[item.owner.priority][item.owner.tenant]
        line.running = [*(s for s in line.running if not s.done), item]
        self._turns += 1
        line.last_turn = self._turns
        return item

    def remove(self, item: Item) -> None:
        """Take a waiting item out."""
        self._classes[item.owner.priority][item.owner.tenant].waiting.remove(item)
        self._waiting[item.owner.priority] -= 1

    def ahead_of(self, owner: Owner) -> list[Item]:
        """What waits and would be given out before something more of ``owner``, as things are now."""
        ahead: list[Item] = []
        for priority, lines in self._classes.items():
            if priority == owner.priority:
                return ahead + _ahead_in(lines, owner)
            for line in lines.values():
                ahead += line.waiting
        raise AssertionError(owner.priority)

    def longest_line(self, priority: Priority) -> tuple[float, Item] | None:
        """Of the tenant with most waiting for its weight: how much that is, and what came last."""
        lines = (line for line in self._classes[priority].values() if line.waiting)
        longest = max(lines, key=_length, default=None)
        return (_length(longest), longest.waiting[-1]) if longest else None

    def waiting_of(self, owner: Owner) -> int:
        """How many of the owner's wait in its class."""
        line = self._classes[owner.priority].get(owner.tenant)
        return len(line.waiting) if line else 0

    def charge(self, tenant: str, weight: float, tokens: int, priority: Priority) -> None:
        """Count tokens that were computed for a tenant."""
        line = self._classes[priority].get(tenant)
        if line is not None:
            line.clock += tokens / weight

    def order(self, items: Iterable[Item]) -> list[Item]:
        """Sequences in the order in which their remaining tokens are due; what comes first goes first."""
        queues: dict[Priority, dict[str, deque[Item]]] = {each: {} for each in self._classes}
        for item in items:
            tenants = queues[item.owner.priority]
            tenants.setdefault(item.owner.tenant, deque()).append(item)
        ordered: list[Item] = []
        for priority, tenants in queues.items():
            lines = self._classes[priority]
            clocks = {tenant: lines[tenant].clock for tenant in tenants}
            while tenants:
                tenant = min(tenants, key=lambda tenant: clocks[tenant])
                item = tenants[tenant].popleft()
                clocks[tenant] += item.remaining / item.owner.weight
                ordered.append(item)
                if not tenants[tenant]:
                    del tenants[tenant]
        return ordered

    def _join(self, item: Item) -> _Line[Item]:
        """The line of the item's tenant, its clock set to the others' if it wanted nothing lately."""
        lines = self._classes[item.owner.priority]
        line = lines.setdefault(item.owner.tenant, _Line())
        if line.wants_more:
            return line
        contended = any(other.wants_more for other in lines.values())
        now = _clock_of(lines.values())
        line.clock = max(line.clock, now)
        for tenant, other in list(lines.items()):
            if other is not line and not other.is_present and (not contended or other.clock <= now):
                del lines[tenant]
        return line


def _clock_of(lines: Iterable[_Line[Item]]) -> float:
    """Where a tenant begins that comes back from idle."""
    contended = [line.clock for line in lines if line.wants_more]
    if contended:
        return min(contended)
    # Without contention nobody took anything from anybody.
    return max((line.clock for line in lines if line.is_present), default=0.0)


def _length(line: _Line[Item]) -> float:
    return len(line.waiting) / line.waiting[-1].owner.weight


def _ahead_in(lines: dict[str, _Line[Item]], owner: Owner) -> list[Item]:
    own = lines.get(owner.tenant)
    ahead = list(own.waiting) if own else []
    start = max(_clock_of(lines.values()), own.clock_to_be if own else 0.0)
    if own and own.wants_more:
        start = own.clock_to_be
    due = start + sum(item.remaining for item in ahead) / owner.weight
    for line in lines.values():
        if line is own:
            continue
        clock = line.clock_to_be
        for item in line.waiting:
            if clock > due:
                break
            ahead.append(item)
            clock += item.remaining / item.owner.weight
    return ahead
