"""Serves embedding models and rerankers: inputs of concurrent requests are computed together."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.chat.template import ChatTemplate
from serving.llamacpp.engine import EngineOptions
from serving.llamacpp.runtime import EmbeddingContext, Model, PairFormat, Pooling, RuntimeFault
from serving.llamacpp.stats import Stats, rows_up_to
from serving.llamacpp.tokenization import Tokenization
from serving.protocol.embeddings import EmbeddingRequest, RerankRequest
from serving.protocol.errors import ApiError
from serving.protocol.responses import Timings

_log = logging.getLogger(__name__)

_EXIT_CODE = 70
_WATCH_SECONDS = 1.0

Vector = NDArray[np.float32]


@dataclass(slots=True, eq=False)
class Job:
    """One request's inputs. The first ``taken`` are in batches; ``vectors`` holds what came out.

    ``error`` says why the rest will not come. ``done`` is set once nothing more will happen.
    """

    inputs: list[list[int]]
    done: asyncio.Event = field(default_factory=asyncio.Event)
    taken: int = 0
    vectors: list[Vector] = field(default_factory=list)
    cancelled: bool = False
    error: str | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    finished_at: float | None = None
    busy_seconds: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens computed so far. Inputs are computed in order."""
        return sum(map(len, self.inputs[: len(self.vectors)]))

    def timings(self) -> Timings:
        """Where the time went, up to the end or up to now."""
        end = self.finished_at or time.monotonic()
        started = self.started_at or end
        return Timings(
            queue_seconds=started - self.arrived_at,
            prefill_seconds=end - started,
            decode_seconds=0.0,
            prefill_busy_seconds=self.busy_seconds,
            decode_busy_seconds=0.0,
        )


class Embedder:
    """A loaded embedding model or reranker. Its methods belong to the event loop that made it."""

    def __init__(self, options: EngineOptions, model: Model, pooling: Pooling) -> None:
        """Allocate compute memory; raises ``RuntimeFault``. The embedder owns ``model`` from now on."""
        if options.adapters:
            raise RuntimeFault("adapters are served beside generating models only; leave them out")
        self.options = options
        self.is_reranker = pooling is Pooling.RANK
        # Beyond its trained length such a model has no positions, or none that mean anything.
        self.context_length = min(options.context_length, model.context_length_trained)
        self._model = model
        self._pair = PairFormat(model)
        self._context = EmbeddingContext(
            model,
            pooling,
            context_length=self.context_length,
            batch_tokens=options.max_batch_tokens,
            threads=options.threads,
        )
        template = ChatTemplate(None, bos_text="", eos_text="", tokenizer_adds_bos=False)
        self.tokenization = Tokenization(
            model, lambda chat: template.render(chat.messages), self.context_length
        )
        self._capacity = options.max_sequences + options.max_queue
        self._loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._unfinished = 0
        self._turns: deque[Job] = deque()
        self._stopping = threading.Event()
        self._batch_started: float | None = None
        self._running = 0
        self._stats = Stats()
        self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._watchdog.start()

    def close(self) -> None:
        """Finish the current batch, end the thread and free all memory."""
        self._stopping.set()
        self._inbox.put(None)
        self._thread.join()
        self._context.close()
        self._model.close()

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._thread.is_alive()

    def load(self) -> dict[str, Any]:
        """Requests with inputs in the batch that is computed now, and the others; totals since the start."""
        running = self._running
        waiting = max(self._unfinished - running, 0)
        # All take turns, whatever their class.
        load = {"waiting": waiting, "waiting_by_class": {"interactive": waiting}}
        return {**load, "running": running, **self._stats.to_json()}

    async def embed(self, request: EmbeddingRequest) -> Job:
        """Start to embed the inputs of a request; raises :class:`ApiError`."""

        def tokens() -> list[list[int]]:
            return [
                self._checked(self.tokenization.tokens_of(item, f"input[{index}]"), "input", index)
                for index, item in enumerate(request.inputs)
            ]

        return self._submit(await asyncio.to_thread(tokens))

    async def rerank(self, request: RerankRequest) -> Job:
        """Start to score the documents of a request; raises :class:`ApiError`."""

        def tokens() -> list[list[int]]:
            return [
                self._checked(self._pair.tokens(request.query, document), "documents", index)
                for index, document in enumerate(request.documents)
            ]

        return self._submit(await asyncio.to_thread(tokens))

    def check_dimensions(self, dimensions: int | None) -> None:
        """Raises :class:`ApiError` (400) if vectors are shorter than the client wants them."""
        if (dimensions or 0) > self._context.width:
            raise ApiError(
                400,
                f"'dimensions' is {dimensions}; this model's vectors have {self._context.width}.",
                param="dimensions",
                code="invalid_value",
            )

    def _checked(self, tokens: list[int], field: str, index: int) -> list[int]:
        param = f"{field}[{index}]"
        if not tokens:
            raise ApiError(400, f"'{param}' has no tokens.", param=param, code="invalid_value")
        if len(tokens) > self.context_length:
            raise ApiError(
                400,
                f"'{param}' has {len(tokens)} tokens; this model takes {self.context_length}.",
                param=param,
                code="context_length_exceeded",
            )
        return tokens

    def _submit(self, inputs: list[list[int]]) -> Job:
        if self._unfinished >= self._capacity:
            raise ApiError(
                503,
                f"{self._capacity} requests wait already; try again in a moment.",
                code="queue_full",
                retry_after_seconds=1,
            )
        self._unfinished += 1
        job = Job(inputs)
        self._inbox.put(job)
        return job

    async def finish(self, job: Job) -> None:
        """Wait for a job's end: all its vectors, or those so far if it was cancelled.

        Raises :class:`ApiError` (500) when it failed. A wait that is given up cancels the job.
        """
        try:
            await job.done.wait()
        finally:
            self.cancel(job)
        if job.error is not None:
            raise ApiError(500, job.error, code="engine_error")

    def cancel(self, job: Job) -> None:
        """End a job before the next batch."""
        job.cancelled = True

    def _finished(self, job: Job) -> None:
        self._unfinished -= 1
        job.done.set()

    # The worker's thread.

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._step()
        except Exception:
            # Requests would wait for ever. The supervisor starts a new process.
            _log.exception("the embedder failed; the engine ends")
            os._exit(_EXIT_CODE)

    def _watch(self) -> None:
        """End the process when a batch does not return: its clients learn so from the gateway."""
        limit_seconds = self.options.step_timeout_seconds
        while not self._stopping.wait(_WATCH_SECONDS):
            started = self._batch_started
            if started is not None and time.monotonic() - started > limit_seconds:
                _log.critical("a batch did not end within %g s; the engine ends", limit_seconds)
                os._exit(_EXIT_CODE)

    def _step(self) -> None:
        self._take_arrivals()
        batch = self._next_batch()
        if not batch:
            return
        jobs = list({job: None for job, _ in batch})
        self._running = len(jobs)
        self._batch_started = started = time.monotonic()
        for job in jobs:
            job.started_at = job.started_at or started
        try:
            with self._stats.time("decode"):
                vectors = self._context.compute([tokens for _, tokens in batch])
        except RuntimeFault as fault:
            _log.error("batch failed: %s", fault)
            for job in jobs:
                job.error = str(fault)
        else:
            rows = sum(len(tokens) for _, tokens in batch)
            self._stats.prefill_steps[rows_up_to(rows)] += 1
            self._stats.prefill_tokens += rows
            seconds = time.monotonic() - started
            for (job, tokens), vector in zip(batch, vectors, strict=True):
                job.busy_seconds += seconds * len(tokens) / rows
                job.vectors.append(vector)
                if not np.isfinite(vector).all():
                    job.error = f"the model computed no number for input {len(job.vectors) - 1}"
        self._batch_started = None
        self._running = 0
        for job in jobs:
            if job.error is not None or len(job.vectors) == len(job.inputs):
                self._end(job)

    def _take_arrivals(self) -> None:
        """Take new jobs; sleeps when there is nothing to do."""
        idle = not self._turns
        while True:
            try:
                job = self._inbox.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if job is None:
                return
            self._turns.append(job)

    def _next_batch(self) -> list[tuple[Job, list[int]]]:
        """Inputs of all jobs in turns: a large request does not keep the small ones waiting."""
        batch: list[tuple[Job, list[int]]] = []
        rows = 0
        while self._turns and len(batch) < self._context.max_sequences:
            job = self._turns[0]
            if job.cancelled:
                self._end(job)
                continue
            tokens = job.inputs[job.taken]
            rows += len(tokens)
            if batch and rows > self._context.batch_tokens:
                break
            batch.append((job, tokens))
            job.taken += 1
            self._turns.rotate(-1)
            if job.taken == len(job.inputs):
                self._turns.pop()
        return batch

    def _end(self, job: Job) -> None:
        if job in self._turns:
            self._turns.remove(job)
        job.finished_at = time.monotonic()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._finished, job)


def normalised(vector: Vector, dimensions: int | None) -> Vector:
    """A vector of length 1, of the first ``dimensions`` of its numbers if that is given."""
    cut = vector[:dimensions]
    norm = float(np.linalg.norm(cut.astype(np.float64)))
    return cut / np.float32(norm) if norm else cut


def base64_of(vector: Vector) -> str:
    """A vector as OpenAI's ``encoding_format: base64`` has it: its float32 numbers, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def relevance(scores: Vector) -> float:
    """A reranker's score between 0 and 1.

    With one label it is the logit of "relevant"; with two, llama.cpp has made them probabilities,
    and the first is that of "yes".
    """
    return (
        1.0 / (1.0 + float(np.exp(-np.float64(scores[0]))))
        if len(scores) == 1
        else float(scores[0])
    )
