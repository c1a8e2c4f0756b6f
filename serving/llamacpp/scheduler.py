"""Continuous batching: requests join and leave the running batch at every step.

A step is of one kind: it decodes (the next token of each running sequence, and perhaps drafts) or it
prefills (chunks of prompts), for sequences of one adapter. Kinds with work take turns. So a request's
prefill and decode times are measurements rather than shares of a mixture, and it costs nothing: with
split KV streams llama.cpp computes the two apart anyway.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from serving.fairness import FairQueue
from serving.llamacpp.grammar import prepare
from serving.llamacpp.prefixes import PrefixStore
from serving.llamacpp.runtime import (
    Context,
    ImageRows,
    LoraAdapter,
    Model,
    RuntimeFault,
    Sampler,
)
from serving.llamacpp.sampling import SamplingThreads, log_softmax, top_tokens
from serving.llamacpp.sequence import Event, Failed, Finished, Job, Phase, Sequence, TextDelta
from serving.llamacpp.slots import Slots
from serving.llamacpp.speculation import Speculation
from serving.llamacpp.stats import Load, Stats, rows_up_to
from serving.protocol.responses import FinishReason, TokenLogprob

_log = logging.getLogger(__name__)

Kind = tuple[Phase, LoraAdapter | None]

_WATCH_SECONDS = 0.5
_EXIT_CODE = 70
# Prefill steps in a row while more sequences wait for their first token than for their next.
_PREFILL_TURNS = 4
# Every row of a scored prompt brings its logits to main memory; this many at a time, of all such prompts together.
_SCORED_ROWS = 64


class QueueFull(Exception):
    """More sequences are waiting than the queue may hold."""


@dataclass(slots=True)
class Span:
    """One sequence's rows in a batch, and what was sampled there: ``first_row`` is the first of them.

    The last ``outputs`` rows have logits. In a decode step the rows after the first hold drafts.
    """

    sequence: Sequence
    tokens: list[int]
    outputs: int
    first_row: int
    sampled: list[tuple[int, TokenLogprob | None]] = field(default_factory=list)
    fault: str | None = None


@dataclass(slots=True)
class Batch:
    """The rows of one step, span by span: of text, or all of ``images``."""

    phase: Phase
    adapter: LoraAdapter | None
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    outputs: list[bool] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    images: list[ImageRows] = field(default_factory=list)

    def add(self, sequence: Sequence, tokens: list[int], outputs: int) -> None:
        """Add the tokens that follow the computed ones; the last ``outputs`` rows get logits."""
        self.spans.append(Span(sequence, tokens, outputs, len(self.tokens)))
        self.tokens += tokens
        start = sequence.position(sequence.computed)
        self.positions += range(start, start + len(tokens))
        if sequence.image is not None:
            self.images.append(sequence.image_rows(len(tokens)))
        self.slots += [sequence.slot] * len(tokens)
        self.outputs += [False] * (len(tokens) - outputs) + [True] * outputs


class Scheduler:
    """Owns the context and its slots; runs steps on a thread of its own.

    ``emit`` is called on that thread with each step's events, in order. A step that takes longer than
    ``step_timeout_seconds`` ends the process: its supervisor starts another.
    """

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        max_queue: int,
        store_bytes: int,
        speculation: Speculation | None,
        step_timeout_seconds: float,
        emit: Callable[[list[Event]], None],
    ) -> None:
        self._model = model
        self._context = context
        self._emit = emit
        self._speculation = speculation
        self._step_timeout_seconds = step_timeout_seconds
        self._capacity = context.slots + max_queue
        self._store = PrefixStore(store_bytes)
        self._slots = Slots(context, self._store)
        self._sampling = SamplingThreads(model.vocab_size)
        self._waiting: FairQueue[Sequence] = FairQueue()
        self._running: list[Sequence] = []
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._unfinished = 0
        self._unfinished_lock = threading.Lock()
        self._last_run: dict[Kind, int] = {}
        self._turns = 0
        self._step_started: float | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.stats = Stats()

    # Called from other threads.

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()
        self._watchdog.start()

    def stop(self) -> None:
        """Finish the current step and end the thread; sequences that are not done are dropped."""
        self._stopping.set()
        self._inbox.put(lambda: None)
        self._thread.join()
        self._sampling.close()

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
        self._inbox.put(partial(self._enqueue, job))

    def cancel(self, job: Job) -> None:
        """End a job's sequences before the next step; each still gets its :class:`Finished` event."""
        self._inbox.put(partial(self._cancel, job))

    def between_steps(self, action: Callable[[], None]) -> None:
        """Have the scheduler's thread run ``action`` when it is not computing."""
        self._inbox.put(action)

    def load(self) -> Load:
        """A snapshot, for metrics."""
        running = list(self._running)
        return Load(
            waiting=max(self._unfinished - len(running), 0),
            waiting_by_class=self._waiting.waiting(),
            running=len(running),
            kv_used_tokens=sum(sequence.computed for sequence in running),
            kv_total_tokens=self._context.kv_tokens,
            prefix_store_bytes=self._store.used_bytes,
        )

    # The scheduler's thread.

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._step()
        except Exception:
            # Requests would wait for ever. The supervisor starts a new process.
            _log.exception("the scheduler failed; the engine ends")
            os._exit(_EXIT_CODE)

    def _watch(self) -> None:
        """End the process when a step does not return: its clients learn so from the gateway."""
        limit_seconds = self._step_timeout_seconds
        while not self._stopping.wait(_WATCH_SECONDS):
            started = self._step_started
            if started is not None and time.monotonic() - started > limit_seconds:
                _log.critical("a step did not end within %g s; the engine ends", limit_seconds)
                os._exit(_EXIT_CODE)

    def _step(self) -> None:
        self._take_arrivals()
        with self.stats.time("build"):
            self._admit()
            batch = self._build()
        if batch is None:
            return
        self._step_started = started = time.monotonic()
        try:
            with self.stats.time("decode"):
                self._decode(batch)
            with self.stats.time("sample"):
                events = self._sample(batch)
        except RuntimeFault as fault:
            _log.error("step failed: %s", fault)
            events = [self._fail(span.sequence, str(fault)) for span in batch.spans]
        self._step_started = None
        with self.stats.time("emit"):
            self._charge(batch, time.monotonic() - started)
            self._emit(events)

    def _take_arrivals(self) -> None:
        """Do what other threads asked for; sleeps when there is nothing to do, not even for later."""
        idle = not self._running and not len(self._waiting)
        while idle and self._inbox.empty() and self._slots.save_ahead():
            pass
        while idle or not self._inbox.empty():
            self._inbox.get()()
            idle = False

    def _enqueue(self, job: Job) -> None:
        for sequence in job.sequences:
            self._waiting.push(sequence)

    def _cancel(self, job: Job) -> None:
        self._emit(
            [self._finish(sequence, None) for sequence in job.sequences if not sequence.done]
        )

    def _admit(self) -> None:
        """Give slots to waiting sequences, in fair order; batch sequences make way for interactive ones."""
        while len(self._waiting):
            sequence = self._waiting.pop()
            if not self._slots.fits(sequence) and not self._preempt_for(sequence):
                self._waiting.push_front(sequence)
                return
            self._slots.admit(sequence)
            if sequence.admitted_at is None:
                sequence.admitted_at = time.monotonic()
                sequence.sampler = Sampler(
                    self._model, sequence.params, self._context.context_length
                )
                if sequence.job.grammar is not None:
                    sequence.matcher = sequence.job.grammar.matcher()
                    prepare([sequence.matcher])
                elif self._speculation is not None and not sequence.images:
                    sequence.speculator = self._speculation.of(sequence.tokens)
            self._note_prefix(sequence)
            sequence.phase = Phase.PREFILL
            self._running.append(sequence)

    def _note_prefix(self, sequence: Sequence) -> None:
        """Count the prompt tokens that were found in cells, once."""
        found = min(sequence.computed, sequence.prompt_tokens)
        if found > sequence.prefilled:
            self.stats.prefix_hit_tokens += found - sequence.prefilled
            sequence.cached += found - sequence.prefilled
            sequence.prefilled = found

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Suspend batch sequences, the youngest first, until an interactive one fits."""
        if sequence.job.priority == "batch":
            return False
        victims = [
            s for s in self._running if s.job.priority == "batch" and self._slots.may_suspend(s)
        ]
        if not self._slots.fits(sequence, without=victims):
            return False
        while not self._slots.fits(sequence):
            self._suspend(victims.pop())
        return True

    def _suspend(self, victim: Sequence) -> None:
        self._slots.suspend(victim)
        self._running.remove(victim)
        victim.phase = Phase.WAITING
        if victim.scores_prompt:
            victim.pending_logprobs = []  # its prompt will be computed, and scored, from the start
        self._waiting.push_front(victim)
        self.stats.preemptions += 1

    def _build(self) -> Batch | None:
        """The batch of the next step."""
        kinds: dict[Kind, list[Sequence]] = {}
        for sequence in self._running:
            if sequence.leader is not None:
                if not self._slots.follow(sequence):
                    continue
                self._note_prefix(sequence)
            kinds.setdefault((sequence.phase, sequence.job.adapter), []).append(sequence)
        if not kinds:
            return None
        kind = self._next_kind(kinds)
        batch = Batch(*kind)
        if batch.phase is Phase.PREFILL:
            self._add_chunks(batch, kinds[kind])
        else:
            self._add_next_tokens(batch, kinds[kind])
        return batch if batch.spans else None

    def _next_kind(self, kinds: dict[Kind, list[Sequence]]) -> Kind:
        """The kind of work that has waited longest; but prefill may go on for a while if more need it."""
        kind = min(kinds, key=lambda kind: (self._last_run.get(kind, 0), kind[0] is Phase.DECODE))
        last = max(self._last_run, key=lambda kind: self._last_run[kind], default=kind)
        if (
            self._turns < _PREFILL_TURNS
            and (last[0], kind[0]) == (Phase.PREFILL, Phase.DECODE)
            and len(kinds.get(last, ())) > len(kinds[kind])
        ):
            kind = last
        self._turns = self._turns + 1 if kind == last else 1
        self._last_run = {each: self._last_run.get(each, 0) for each in kinds}
        self._last_run[kind] = max(self._last_run.values()) + 1
        return kind

    def _add_chunks(self, batch: Batch, prefilling: list[Sequence]) -> None:
        """Chunks of prompts, as many tokens as a batch may hold, in fair order between tenants."""
        budget, scored_budget = self._context.batch_tokens, _SCORED_ROWS
        chunks: list[tuple[Sequence, int]] = []
        for sequence in self._waiting.order(prefilling):
            if chunks and not sequence.goes_with(chunks[0][0]):
                continue
            at_most = _SCORED_ROWS if sequence.scores_prompt else self._context.batch_tokens
            room = min(budget, scored_budget) if sequence.scores_prompt else budget
            count = min(sequence.stretch, room)
            # Rows beyond the shortest chunk are computed apart, so a piece of a prompt should be worth it.
            if count == sequence.stretch or 2 * count >= at_most or not chunks:
                chunks.append((sequence, count))
                budget -= count
                scored_budget -= count if sequence.scores_prompt else 0
        for sequence, count in self._in_room(chunks):
            tokens = sequence.tokens[sequence.computed : sequence.computed + count]
            scored = count if sequence.scores_prompt else 0
            batch.add(sequence, tokens, scored or int(count == sequence.remaining))

    def _add_next_tokens(self, batch: Batch, decoding: list[Sequence]) -> None:
        """The last token of each sequence, and drafts of what may follow."""
        chunks = self._in_room([(sequence, 1) for sequence in decoding])
        rows = len(chunks)
        for sequence, _ in chunks:
            drafts: list[int] = []
            if sequence.speculator is not None:
                room = min(sequence.limit - sequence.generated, self._context.batch_tokens - rows)
                drafts = sequence.speculator.draft(sequence.tokens, len(chunks), room - 1)
                if not self._slots.make_room(rows + len(drafts)):
                    drafts = []
            rows += len(drafts)
            batch.add(sequence, [sequence.tokens[-1], *drafts], 1 + len(drafts))

    def _in_room(self, chunks: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """The chunks that the pool has cells for, by slot: llama.cpp computes neighbours together.

        Sequences are suspended until the others' cells suffice: batch before interactive, the youngest first.
        """
        while not self._slots.make_room(sum(count for _, count in chunks)):
            youngest_first = reversed(self._running)
            victims = [s for s in youngest_first if self._slots.may_suspend(s)]
            victim = min(victims, key=lambda s: s.job.priority == "interactive")
            self._suspend(victim)
            chunks = [chunk for chunk in chunks if chunk[0] is not victim]
        return sorted(chunks, key=lambda chunk: chunk[0].slot)

    def _decode(self, batch: Batch) -> None:
        self._context.use_adapter(batch.adapter)
        try:
            if batch.images:
                self._context.decode_images(batch.images, batch.slots, batch.outputs)
            else:
                self._context.decode(batch.tokens, batch.positions, batch.slots, batch.outputs)
        finally:
            self._slots.decoded()
        for span in batch.spans:
            sequence = span.sequence
            self._slots[sequence.slot].tokens += span.tokens
            sequence.computed += len(span.tokens)
            if sequence.first_token_at is None:
                sequence.prefilled = max(sequence.prefilled, sequence.computed)

    def _sample(self, batch: Batch) -> list[Event]:
        spans = [span for span in batch.spans if span.outputs]
        self._sampling.run([partial(self._choose, span, batch.phase) for span in spans])
        events = [event for span in spans for event in self._accept(span, batch.phase)]
        prepare([s.matcher for s in self._running if s.matcher is not None])
        return events

    def _choose(self, span: Span, phase: Phase) -> None:
        """Sample the span's rows, as far as its drafts prove right. Runs on any thread, one a sequence."""
        sequence, job = span.sequence, span.sequence.job
        assert sequence.sampler is not None
        first = span.first_row + len(span.tokens) - span.outputs
        if phase is Phase.PREFILL and sequence.scores_prompt:
            self._score(span)
            first += span.outputs - 1
            if sequence.remaining:
                return
        drafts = span.tokens[1:] if phase is Phase.DECODE else []
        for row, draft in enumerate([*drafts, None], first):
            logits = self._context.logits(row)
            likeliest = int(logits.argmax())  # of a NaN, if there is one
            if not math.isfinite(logits[likeliest]):
                span.fault = "the model computed no valid numbers for this request (NaN)"
                return
            logprobs = None if job.top_logprobs is None else log_softmax(logits)
            if sequence.matcher is not None:
                sequence.matcher.apply(logits)
                token = sequence.sampler.sample(self._context, row)
                sequence.matcher.accept(token)
                span.fault = sequence.matcher.fault
            elif sequence.params.is_greedy:
                token = likeliest
            else:
                token = sequence.sampler.sample(self._context, row)
            scored = None
            if logprobs is not None and job.top_logprobs is not None:
                scored = self._logprob(token, logprobs, job.top_logprobs)
            span.sampled.append((token, scored))
            if token != draft or self._model.ends_generation(token):
                return

    def _accept(self, span: Span, phase: Phase) -> list[Event]:
        """Append a span's tokens to its sequence; returns the text and the end they bring."""
        sequence = span.sequence
        if span.fault is not None:
            return [self._fail(sequence, span.fault)]
        events: list[Event] = []
        if phase is Phase.DECODE and sequence.speculator is not None:
            rejected = span.outputs - len(span.sampled)
            if rejected:
                self._slots.rewind(sequence, sequence.computed - rejected)
            self.stats.drafted_tokens += span.outputs - 1
            self.stats.accepted_tokens += len(span.sampled) - 1
            sequence.speculator.record(span.outputs - 1, len(span.sampled) - 1)
        if sequence.first_token_at is None and not sequence.remaining:
            sequence.first_token_at = time.monotonic()
            if sequence.job.echo:
                events.append(self._echo(sequence))
            if not sequence.limit:
                return [*events, self._finish(sequence, "length")]
        for token, logprob in span.sampled:
            sequence.phase = Phase.DECODE
            events += self._append(sequence, token, logprob)
            if sequence.done:
                break
        return events

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> list[Event]:
        """Append a sampled token; returns the text it completes and, if it is the last, the end."""
        sequence.tokens.append(token)
        ended = self._model.ends_generation(token) and not sequence.job.ignore_eos
        if ended:
            text = sequence.text.finish()
        else:
            if logprob is not None:
                sequence.pending_logprobs.append(logprob)
            control = sequence.job.show_control_tokens
            text = sequence.text.push(self._model.piece(token, control=control))
        reason: FinishReason | None = None
        if ended or sequence.text.stopped:
            reason = "stop"
        elif sequence.generated == sequence.limit:
            reason = "length"
            text += sequence.text.finish()
        elif sequence.matcher is not None and sequence.matcher.stopped:
            reason = "stop"
            text += sequence.text.finish()
        events: list[Event] = []
        if text or (reason and sequence.pending_logprobs):
            events.append(TextDelta(sequence, text, sequence.pending_logprobs))
            sequence.pending_logprobs = []
        if reason:
            events.append(self._finish(sequence, reason))
        return events

    def _score(self, span: Span) -> None:
        """Log-probabilities of the prompt tokens that follow the span's rows."""
        sequence, top = span.sequence, span.sequence.job.top_logprobs or 0
        start = sequence.computed - span.outputs
        if start == 0:
            piece, *_ = self._prompt_pieces(sequence.tokens[:1])
            sequence.pending_logprobs.append(TokenLogprob(piece, None, ()))
        for row, token in enumerate(
            sequence.tokens[start + 1 : sequence.computed + 1], span.first_row
        ):
            logprobs = log_softmax(self._context.logits(row))
            sequence.pending_logprobs.append(self._logprob(token, logprobs, top))

    def _logprob(self, token: int, logprobs: NDArray[np.float64], top: int) -> TokenLogprob:
        piece = partial(self._model.piece, control=True)
        alternatives = tuple(
            (piece(other), float(logprobs[other])) for other in top_tokens(logprobs, top)
        )
        return TokenLogprob(piece(token), float(logprobs[token]), alternatives)

    def _echo(self, sequence: Sequence) -> TextDelta:
        """The prompt as text."""
        pieces = self._prompt_pieces(sequence.tokens[: sequence.prompt_tokens])
        text = b"".join(pieces).decode("utf-8", errors="replace")
        delta = TextDelta(sequence, text, sequence.pending_logprobs)
        sequence.pending_logprobs = []
        return delta

    def _prompt_pieces(self, tokens: list[int]) -> Iterator[bytes]:
        """What was asked: with control tokens, but for the first one if it was put there for the model."""
        for at, token in enumerate(tokens):
            yield self._model.piece(token, control=at > 0 or not self._model.adds_bos)

    def _finish(self, sequence: Sequence, reason: FinishReason | None) -> Finished:
        if sequence.slot >= 0:
            self._slots.release(sequence)
        self._forget(sequence)
        return Finished(sequence, reason)

    def _fail(self, sequence: Sequence, message: str) -> Failed:
        self._slots.discard(sequence)
        self._forget(sequence)
        return Failed(sequence, message)

    def _forget(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        sequence.phase = Phase.DONE
        sequence.finished_at = time.monotonic()
        with self._unfinished_lock:
            self._unfinished -= 1

    def _charge(self, batch: Batch, seconds: float) -> None:
        """Share a step's duration among its sequences, by their rows, and count its tokens."""
        rows = len(batch.tokens)
        for span in batch.spans:
            sequence, share = span.sequence, seconds * len(span.tokens) / rows
            job = sequence.job
            self._waiting.charge(job.tenant, job.weight, len(span.tokens), job.priority)
            if batch.phase is Phase.PREFILL:
                sequence.prefill_busy_seconds += share
            else:
                sequence.decode_busy_seconds += share
        if batch.phase is Phase.PREFILL:
            self.stats.prefill_steps[rows_up_to(rows)] += 1
            self.stats.prefill_tokens += rows
        else:
            self.stats.decode_steps[rows_up_to(rows)] += 1
            self.stats.decode_tokens += rows
            if self._speculation is not None:
                self._speculation.observe(rows, seconds)
