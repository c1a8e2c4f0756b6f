"""Which sequence holds which slot, what every slot's cells know, and prefixes that lost their slot.

A prompt is computed once: a newcomer takes over the longest prefix that any slot or the store knows,
and waits for one that another sequence is just computing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from serving.llamacpp.prefixes import PrefixStore, Saved, common_prefix, size_of
from serving.llamacpp.runtime import Context, LoraAdapter
from serving.llamacpp.sequence import Phase, Sequence

# Shorter matches are chance (the template's first words), not worth moving cells for.
SMALLEST_USEFUL_PREFIX = 32
# A newcomer that keeps this share of a warm slot goes on with its conversation, and may take it.
_CONTINUES = 0.75
# Cells of a pool left to running sequences when a newcomer is admitted, for each.
_GROWTH_TOKENS = 32


@dataclass(slots=True)
class Slot:
    """``tokens`` are in its cells, also after its sequence has left; ``used_at`` counts admissions."""

    number: int
    tokens: list[int] = field(default_factory=list)
    adapter: LoraAdapter | None = None
    sequence: Sequence | None = None
    used_at: int = 0


class Slots:
    """All slots of a context. The scheduler's thread alone uses them."""

    def __init__(self, context: Context, store: PrefixStore) -> None:
        self._context = context
        self._slots = [Slot(number) for number in range(context.slots)]
        self._store = store
        self._admissions = 0
        # Slots with a part in stream copies, which the next decode makes: until then they are left alone.
        self._pinned: set[int] = set()

    def __getitem__(self, number: int) -> Slot:
        return self._slots[number]

    @property
    def free(self) -> list[Slot]:
        """Slots that may be given away, warm or empty."""
        return [
            slot
            for slot in self._slots
            if slot.sequence is None and slot.number not in self._pinned
        ]

    @property
    def busy(self) -> list[Slot]:
        """Slots with a sequence."""
        return [slot for slot in self._slots if slot.sequence is not None]

    @property
    def held_tokens(self) -> int:
        """Cells that running sequences hold; what several share is counted for each."""
        return sum(len(slot.tokens) for slot in self.busy)

    def decoded(self) -> None:
        """Tell that a decode has carried out the copies."""
        self._pinned.clear()

    def may_suspend(self, sequence: Sequence) -> bool:
        """Whether :meth:`suspend` can be called before the next decode."""
        return sequence.slot not in self._pinned

    def fits(self, sequence: Sequence, without: Collection[Sequence] = ()) -> bool:
        """Whether there is a free slot, and cells in the pool for all that the sequence is now.

        Or whether there would be if the sequences ``without`` were suspended.
        """
        if not self.free and not without:
            return False
        if not self._context.is_pool:
            return True
        staying = [s.sequence for s in self.busy if s.sequence and s.sequence not in without]
        promised = sum(len(other.tokens) for other in staying)
        needed = promised + len(sequence.tokens) + _GROWTH_TOKENS * (len(staying) + 1)
        return needed <= self._context.kv_tokens or not staying

    def make_room(self, rows: int) -> bool:
        """See that the pool has cells for ``rows`` more tokens; drops warm slots. False: still too few."""
        if not self._context.is_pool:
            return True
        warm = sorted(self.free, key=lambda slot: slot.used_at)
        held = sum(len(slot.tokens) for slot in self._slots)
        for slot in warm:
            if held + rows <= self._context.kv_tokens:
                return True
            held -= len(slot.tokens)
            self._empty(slot, keep=True)
        return held + rows <= self._context.kv_tokens

    def save_ahead(self) -> bool:
        """Save what one warm slot knows, if the store has room for it: the slot can then be given away at once.

        False: there is nothing to save.
        """
        for slot in self.free:
            if self._is_unsaved(slot):
                room = self._store.capacity_bytes - self._store.used_bytes
                if self._saved_bytes(slot) <= room:
                    return self._save(slot)
        return False

    def admit(self, sequence: Sequence) -> None:
        """Give the sequence a free slot with the longest prefix known; one must be free.

        ``sequence.leader`` is set when another sequence is computing a longer one: :meth:`follow`.
        """
        source, shared = self._longest_known(sequence)
        saved = self._store.longest(sequence.tokens, sequence.job.adapter)
        stored = self._limit(sequence, saved.tokens) if saved else 0
        leader, coming = self._longest_coming(sequence)
        target = self._target(source, shared)
        there = self._known(sequence, target)
        best = max(shared, stored)
        if leader is not None and coming >= best + SMALLEST_USEFUL_PREFIX:
            self._empty(target, keep=True)
            sequence.leader, best = leader, 0
        elif best < there + SMALLEST_USEFUL_PREFIX:
            if there < _CONTINUES * len(target.tokens):
                self._keep(target)
            best = there
        elif source is not None and shared >= stored:
            self._empty(target, keep=True)
            self._copy(source, target)
            if source.sequence is None and shared >= _CONTINUES * len(source.tokens):
                self._empty(source, keep=False)  # it has moved
        elif saved is not None:
            self._store.held = saved
            self._empty(target, keep=True)
            self._store.held = None
            if not self._restore(target, saved):
                best = 0
            elif stored >= _CONTINUES * len(saved.tokens):
                self._store.remove(saved)
        self._admissions += 1
        target.used_at, target.adapter = self._admissions, sequence.job.adapter
        target.sequence = sequence
        sequence.slot = target.number
        self._cut(target, sequence, best)
        sequence.computed = len(target.tokens)

    def follow(self, sequence: Sequence) -> bool:
        """Take over what the leader has computed for the sequence; False while that is still going on."""
        leader, slot = sequence.leader, self._slots[sequence.slot]
        if leader is None:
            return True
        if leader.phase is Phase.PREFILL and leader.computed < self._limit(sequence, leader.tokens):
            return False
        sequence.leader = None
        source, shared = self._longest_known(sequence, but=slot)
        if source is not None and shared >= SMALLEST_USEFUL_PREFIX:
            self._copy(source, slot)
            self._cut(slot, sequence, shared)
            sequence.computed = len(slot.tokens)
        return True

    def release(self, sequence: Sequence) -> None:
        """The sequence leaves; its slot stays warm."""
        self._slots[sequence.slot].sequence = None
        sequence.slot = -1

    def suspend(self, sequence: Sequence) -> None:
        """The sequence gives up its slot and cells for others; what it has computed goes to the store."""
        slot = self._slots[sequence.slot]
        self._empty(slot, keep=True)
        self.release(sequence)
        sequence.computed, sequence.leader = 0, None

    def discard(self, sequence: Sequence) -> None:
        """The sequence leaves, and its cells are not to be trusted."""
        self._empty(self._slots[sequence.slot], keep=False)
        self.release(sequence)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Forget the sequence's cells from ``length`` on (drafts that were not accepted)."""
        self._cut(self._slots[sequence.slot], sequence, length)
        sequence.computed = len(self._slots[sequence.slot].tokens)

    def _longest_known(
        self, sequence: Sequence, but: Slot | None = None
    ) -> tuple[Slot | None, int]:
        """The slot whose cells begin most like the sequence; among equals a busy one, then the lowest."""
        best, length = None, 0
        for slot in sorted(self._slots, key=lambda slot: slot.sequence is None):
            shared = self._known(sequence, slot)
            if slot is not but and shared > length:
                best, length = slot, shared
        return best, length

    def _longest_coming(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """The sequence in prefill whose prompt begins most like this one's.

        One that waits for another itself is none: sequences would wait in a circle. Nor is one of a
        class that gives way to this one's.
        """
        best, length = None, 0
        for slot in self.busy:
            other = slot.sequence
            if (
                other is not None
                and other.phase is Phase.PREFILL
                and other.leader is None
                and other.job.adapter is sequence.job.adapter
                and sequence.job.priority in ("batch", other.job.priority)
            ):
                shared = self._limit(sequence, other.tokens)
                if shared > length:
                    best, length = other, shared
        return best, length

    def _known(self, sequence: Sequence, slot: Slot) -> int:
        """How much of the sequence is in the slot's cells."""
        return self._limit(sequence, slot.tokens) if slot.adapter is sequence.job.adapter else 0

    def _limit(self, sequence: Sequence, known: list[int]) -> int:
        # At least one token is computed: its logits choose the next. Scored prompts are computed whole.
        if sequence.scores_prompt:
            return 0
        return min(common_prefix(known, sequence.tokens), len(sequence.tokens) - 1)

    def _target(self, source: Slot | None, shared: int) -> Slot:
        """The free slot to give away."""
        free = self.free
        if not self._context.is_pool and self._store.capacity_bytes:
            # llama.cpp computes only neighbouring streams together, which counts for more than to move
            # cells: busy slots are kept adjacent, and what the slot knew goes to the store.
            return free[0]
        if source in free and shared >= _CONTINUES * len(source.tokens):
            return source
        return min(free, key=lambda slot: (bool(slot.tokens), slot.used_at))

    def _empty(self, slot: Slot, *, keep: bool) -> None:
        if keep:
            self._keep(slot)
        self._context.truncate(slot.number, 0)
        slot.tokens = []

    def _is_unsaved(self, slot: Slot) -> bool:
        """Whether it knows something that is worth saving and not in the store."""
        is_useful = len(slot.tokens) >= SMALLEST_USEFUL_PREFIX and self._store.capacity_bytes > 0
        return is_useful and not self._store.refresh(slot.tokens, slot.adapter)

    def _keep(self, slot: Slot) -> None:
        if self._is_unsaved(slot):
            self._save(slot)

    def _saved_bytes(self, slot: Slot) -> int:
        return size_of(len(slot.tokens), self._context.saved_bytes(slot.number))

    def _save(self, slot: Slot) -> bool:
        # Room comes first: what is saved and what goes for it are never there together.
        if not self._store.make_room(slot.tokens, slot.adapter, self._saved_bytes(slot)):
            return False
        cells = self._context.save(slot.number)
        if cells is None:
            return False
        self._store.put(Saved(slot.adapter, list(slot.tokens), cells))
        return True

    def _restore(self, slot: Slot, saved: Saved) -> bool:
        self.make_room(len(saved.tokens))
        restored = self._context.restore(slot.number, saved.cells)
        slot.tokens = list(saved.tokens) if restored else []
        return restored

    def _copy(self, source: Slot, target: Slot) -> None:
        self._context.copy(source.number, target.number)
        target.tokens = list(source.tokens)
        if not self._context.is_pool:
            self._pinned |= {source.number, target.number}

    def _cut(self, slot: Slot, sequence: Sequence, length: int) -> None:
        """Forget all but the first ``length`` tokens, which the sequence begins with, too."""
        if length < len(slot.tokens):
            kept = length if self._context.truncate(slot.number, sequence.position(length)) else 0
            del slot.tokens[kept:]
