"""Continuous batching: requests join and leave the running batch at every step.

A step either decodes (one row for each running sequence) or prefills (chunks of prompts), in turns
when there is both to do. Steps of one kind make a request's prefill and decode time a measurement
rather than an estimate, and cost nothing: with split KV streams llama.cpp computes the two apart anyway.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from serving.llamacpp.runtime import Context, Model, RuntimeFault, Sampler
from serving.llamacpp.sampling import log_softmax, top_tokens
from serving.llamacpp.sequence import Event, Failed, Finished, Job, Phase, Sequence, TextDelta
from serving.protocol.responses import FinishReason, TokenLogprob

_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """More sequences are waiting than the queue may hold."""


@dataclass(slots=True)
class Slot:
    """A stream of KV cells. ``tokens`` are in its cells, also after the sequence has left."""

    number: int
    tokens: list[int] = field(default_factory=list)
    sequence: Sequence | None = None


@dataclass(slots=True)
class Batch:
    """The rows of one step; ``sampled`` pairs an output row with the sequence it belongs to."""

    phase: Phase
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    outputs: list[bool] = field(default_factory=list)
    sampled: list[tuple[int, Sequence]] = field(default_factory=list)
    rows: list[tuple[Sequence, int]] = field(default_factory=list)

    def add(self, sequence: Sequence, count: int) -> None:
        """Add the next ``count`` tokens of a sequence; the last row is sampled once none remain."""
        start, end = sequence.computed, sequence.computed + count
        self.tokens += sequence.tokens[start:end]
        self.positions += range(start, end)
        self.slots += [sequence.slot] * count
        self.outputs += [False] * count
        if end == len(sequence.tokens):
            self.outputs[-1] = True
            self.sampled.append((len(self.tokens) - 1, sequence))
        self.rows.append((sequence, count))


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is: sequences that wait, sequences in slots, KV cells in use and in all."""

    waiting: int
    running: int
    kv_used_tokens: int
    kv_total_tokens: int


class Scheduler:
    """Owns the context and its slots; runs steps on a thread of its own.

    ``emit`` is called on that thread with each step's events, in order.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        max_queue: int,
        emit: Callable[[list[Event]], None],
    ) -> None:
        self._model = model
        self._context = context
        self._emit = emit
        self._capacity = context.slots + max_queue
        self._slots = [Slot(number) for number in range(context.slots)]
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._unfinished = 0
        self._unfinished_lock = threading.Lock()
        self._decode_next = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # Called from other threads.

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the current step and end the thread; sequences that are not done are dropped."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether steps are being run."""
        return self._thread.is_alive()

    @property
    def capacity(self) -> int:
        """Sequences that may be unfinished at a time, in slots and in the queue together."""
        return self._capacity

    def submit(self, job: Job) -> None:
        """Queue all sequences of a job; raises :class:`QueueFull` and queues none if they do not fit."""
        with self._unfinished_lock:
            if self._unfinished + len(job.sequences) > self._capacity:
                raise QueueFull
            self._unfinished += len(job.sequences)
        self._inbox.put(job)

    def cancel(self, job: Job) -> None:
        """End a job's sequences before the next step; each still gets its :class:`Finished` event."""
        job.cancelled = True
        self._inbox.put(job)

    def load(self) -> Load:
        """A snapshot, for metrics."""
        running = list(self._running)
        return Load(
            waiting=max(self._unfinished - len(running), 0),
            running=len(running),
            kv_used_tokens=sum(sequence.computed for sequence in running),
            kv_total_tokens=self._context.slots * self._context.context_length,
        )

    # The scheduler's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._step()
        except Exception:
            # Requests would wait for ever. The supervisor starts a new process.
            _log.exception("the scheduler failed; the engine ends")
            os._exit(70)

    def _step(self) -> None:
        self._take_arrivals()
        self._admit()
        batch = self._build()
        if batch is None:
            return
        started = time.monotonic()
        try:
            self._context.decode(batch.tokens, batch.positions, batch.slots, batch.outputs)
            events = self._sample(batch)
        except RuntimeFault as fault:
            _log.error("step failed: %s", fault)
            events = [self._fail(sequence, str(fault)) for sequence, _ in batch.rows]
        _charge(batch, time.monotonic() - started)
        self._emit(events)

    def _take_arrivals(self) -> None:
        """Move new jobs to the queue and end cancelled ones; sleeps when there is nothing to do."""
        idle = not self._running and not self._waiting
        while True:
            try:
                job = self._inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if job is None:
                return
            if job.cancelled:
                self._emit([self._finish(s, None) for s in job.sequences if s.phase != Phase.DONE])
            else:
                self._waiting.extend(job.sequences)

    def _admit(self) -> None:
        """Give free slots to waiting sequences, oldest first."""
        while self._waiting and len(self._running) < len(self._slots):
            sequence = self._waiting.popleft()
            if sequence.phase is Phase.DONE:
                continue
            slot = self._choose_slot(sequence)
            # At least one prompt token is computed: its logits choose the first token.
            shared = min(_common_prefix(slot.tokens, sequence.tokens), sequence.prompt_tokens - 1)
            if not self._context.truncate(slot.number, shared):
                shared = 0
            del slot.tokens[shared:]
            slot.sequence = sequence
            sequence.slot, sequence.computed, sequence.cached = slot.number, shared, shared
            sequence.sampler = Sampler(self._model, sequence.params, self._context.context_length)
            sequence.admitted_at = time.monotonic()
            sequence.phase = Phase.PREFILL
            self._running.append(sequence)

    def _choose_slot(self, sequence: Sequence) -> Slot:
        """The free slot that knows most of the prompt; among equals the lowest.

        Low numbers keep the running slots adjacent: llama.cpp computes only neighbours together.
        """
        free = (slot for slot in self._slots if slot.sequence is None)
        return max(free, key=lambda slot: (_useful_prefix(slot, sequence), -slot.number))

    def _build(self) -> Batch | None:
        prefilling = [s for s in self._running if s.phase is Phase.PREFILL]
        decoding = [s for s in self._running if s.phase is Phase.DECODE]
        if prefilling and not (decoding and self._decode_next):
            batch = self._prefill_batch(prefilling)
        elif decoding:
            batch = Batch(Phase.DECODE)
            for sequence in sorted(decoding, key=lambda s: s.slot):
                batch.add(sequence, 1)
        else:
            return None
        self._decode_next = batch.phase is Phase.PREFILL
        return batch

    def _prefill_batch(self, prefilling: list[Sequence]) -> Batch:
        """Chunks of the oldest prompts, as many tokens as a batch may hold."""
        budget = self._context.batch_tokens
        chunks: list[tuple[Sequence, int]] = []
        for sequence in prefilling:
            count = min(sequence.remaining_prompt, budget)
            if count:
                chunks.append((sequence, count))
                budget -= count
        batch = Batch(Phase.PREFILL)
        for sequence, count in sorted(chunks, key=lambda chunk: chunk[0].slot):
            batch.add(sequence, count)
        return batch

    def _sample(self, batch: Batch) -> list[Event]:
        for sequence, count in batch.rows:
            slot = self._slots[sequence.slot]
            slot.tokens += sequence.tokens[sequence.computed : sequence.computed + count]
            sequence.computed += count
        events: list[Event] = []
        for row, sequence in batch.sampled:
            assert sequence.sampler is not None
            token = sequence.sampler.sample(self._context, row)
            events += self._accept(sequence, token, row)
        return events

    def _accept(self, sequence: Sequence, token: int, row: int) -> list[Event]:
        """Append a sampled token; returns the text it completes and, if it is the last, the end."""
        sequence.tokens.append(token)
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
            sequence.phase = Phase.DECODE
        ended = self._model.ends_generation(token) and not sequence.job.ignore_eos
        if ended:
            text = sequence.text.finish()
        else:
            if sequence.job.top_logprobs is not None:
                sequence.pending_logprobs.append(
                    self._logprob(token, row, sequence.job.top_logprobs)
                )
            text = sequence.text.push(self._model.piece(token))
        reason: FinishReason | None = None
        if ended or sequence.text.stopped:
            reason = "stop"
        elif sequence.generated == sequence.limit:
            reason = "length"
            text += sequence.text.finish()
        events: list[Event] = []
        if text or (reason and sequence.pending_logprobs):
            events.append(TextDelta(sequence, text, sequence.pending_logprobs))
            sequence.pending_logprobs = []
        if reason:
            events.append(self._finish(sequence, reason))
        return events

    def _logprob(self, token: int, row: int, top: int) -> TokenLogprob:
        logprobs = log_softmax(self._context.logits(row))
        alternatives = tuple(
            (self._model.piece(other), float(logprobs[other]))
            for other in top_tokens(logprobs, top)
        )
        return TokenLogprob(self._model.piece(token), float(logprobs[token]), alternatives)

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> Finished:
        self._release(sequence)
        return Finished(sequence, reason)

    def _fail(self, sequence: Sequence, message: str) -> Failed:
        slot = self._slots[sequence.slot]
        self._context.truncate(slot.number, 0)
        slot.tokens.clear()
        self._release(sequence)
        return Failed(sequence, message)

    def _release(self, sequence: Sequence) -> None:
        if sequence.phase in (Phase.PREFILL, Phase.DECODE):
            self._running.remove(sequence)
            self._slots[sequence.slot].sequence = None
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        sequence.phase = Phase.DONE
        sequence.finished_at = time.monotonic()
        with self._unfinished_lock:
            self._unfinished -= 1


def _charge(batch: Batch, seconds: float) -> None:
    """Share a step's duration among its sequences, by their rows."""
    for sequence, count in batch.rows:
        share = seconds * count / len(batch.tokens)
        if batch.phase is Phase.PREFILL:
            sequence.prefill_busy_seconds += share
        else:
            sequence.decode_busy_seconds += share


def _common_prefix(left: list[int], right: list[int]) -> int:
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return min(len(left), len(right))


# Shorter matches are chance (the template's first words), not a conversation that goes on.
_SMALLEST_USEFUL_PREFIX = 32


def _useful_prefix(slot: Slot, sequence: Sequence) -> int:
    length = _common_prefix(slot.tokens, sequence.tokens)
    return length if length >= _SMALLEST_USEFUL_PREFIX else 0
