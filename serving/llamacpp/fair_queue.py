"""Which sequence is served next, so that tenants share the engine by weight, measured in tokens.

Every tenant has a clock in each priority class: the tokens computed for it, divided by its weight. The
tenant whose clock is furthest behind is next. One that comes back from idle starts with the others: it
is neither punished for what it used when nobody else wanted it, nor has it saved up credit ("virtual
token counters": Sheng et al., Fairness in Serving Large Language Models, OSDI 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.llamacpp.sequence import Phase, Sequence
from serving.protocol.tenancy import Priority


@dataclass(slots=True)
class _Line:
    """A tenant's place in a class: what waits, what was given out and is not done, and the clock."""

    clock: float = 0.0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    last_turn: int = 0

    @property
    def is_present(self) -> bool:
        """Whether anything of it waits or runs."""
        return bool(self.waiting) or not all(s.done for s in self.running)

    @property
    def wants_more(self) -> bool:
        """Whether it could use a larger share than it has: something waits, or computes its prompt."""
        return bool(self.waiting) or any(
            s.phase in (Phase.WAITING, Phase.PREFILL) for s in self.running
        )

    @property
    def clock_to_be(self) -> float:
        """The clock once the prompts given out are computed: a burst takes no slots before it is charged."""
        return self.clock + sum(s.remaining / s.job.weight for s in self.running if not s.done)


class FairQueue:
    """The waiting sequences; also the clocks by which running ones share a prefill step.

    A class gives way to the one before it altogether. A tenant's own sequences keep their order. The
    scheduler's thread alone uses it, but for :meth:`waiting`.
    """

    def __init__(self) -> None:
        self._classes: dict[Priority, dict[str, _Line]] = {"interactive": {}, "batch": {}}
        self._waiting: dict[str, int] = {"interactive": 0, "batch": 0}
        self._turns = 0

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def waiting(self) -> dict[str, int]:
        """How many sequences wait, by class; any thread may ask."""
        return dict(self._waiting)

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its tenant."""
        self._join(sequence).waiting.append(sequence)
        self._waiting[sequence.job.priority] += 1

    def push_front(self, sequence: Sequence) -> None:
        """Put a sequence that :meth:`pop` gave out back before those of its tenant."""
        line = self._join(sequence)
        if sequence in line.running:
            line.running.remove(sequence)
        line.last_turn = 0  # that turn does not count
        line.waiting.appendleft(sequence)
        self._waiting[sequence.job.priority] += 1

    def peek(self, priority: Priority | None = None) -> Sequence | None:
        """What :meth:`pop` would give out, of one class or of all."""
        for lines in self._classes.values() if priority is None else (self._classes[priority],):
            candidates = [line for line in lines.values() if line.waiting]
            if candidates:
                # Among equals the one whose last turn is longest ago.
                return min(candidates, key=lambda line: (line.clock_to_be, line.last_turn)).waiting[
                    0
                ]
        return None

    def pop(self) -> Sequence:
        """Give out the sequence that is next; IndexError if none waits."""
        sequence = self.peek()
        if sequence is None:
            raise IndexError("nothing waits")
        self.remove(sequence)
        line = self._classes[sequence.job.priority][sequence.job.tenant]
        line.running = [*(s for s in line.running if not s.done), sequence]
        self._turns += 1
        line.last_turn = self._turns
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out."""
        self._classes[sequence.job.priority][sequence.job.tenant].waiting.remove(sequence)
        self._waiting[sequence.job.priority] -= 1

    def charge(self, tenant: str, weight: float, tokens: int, priority: Priority) -> None:
        """Count tokens that were computed for a tenant."""
        line = self._classes[priority].get(tenant)
        if line is not None:
            line.clock += tokens / weight

    def order(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Sequences in the order in which their remaining tokens are due; what comes first goes first."""
        queues: dict[Priority, dict[str, deque[Sequence]]] = {each: {} for each in self._classes}
        for sequence in sequences:
            tenants = queues[sequence.job.priority]
            tenants.setdefault(sequence.job.tenant, deque()).append(sequence)
        ordered: list[Sequence] = []
        for priority, tenants in queues.items():
            lines = self._classes[priority]
            clocks = {tenant: lines[tenant].clock for tenant in tenants}
            while tenants:
                tenant = min(tenants, key=lambda tenant: clocks[tenant])
                sequence = tenants[tenant].popleft()
                clocks[tenant] += sequence.remaining / sequence.job.weight
                ordered.append(sequence)
                if not tenants[tenant]:
                    del tenants[tenant]
        return ordered

    def _join(self, sequence: Sequence) -> _Line:
        """The line of the sequence's tenant, its clock set to the others' if it wanted nothing lately."""
        lines = self._classes[sequence.job.priority]
        line = lines.setdefault(sequence.job.tenant, _Line())
        if line.wants_more:
            return line
        contended = [other.clock for other in lines.values() if other.wants_more]
        if contended:
            now = min(contended)
        else:
            # Without contention nobody took anything from anybody.
            now = max((other.clock for other in lines.values() if other.is_present), default=0.0)
        line.clock = max(line.clock, now)
        for tenant, other in list(lines.items()):
            if other is not line and not other.is_present and (not contended or other.clock <= now):
                del lines[tenant]
        return line
