"""A scheduler in the test's own process, on the real model."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from serving.llamacpp.runtime import Context, Image, Model
from serving.llamacpp.sampling import SamplingParams
from serving.llamacpp.scheduler import Scheduler
from serving.llamacpp.sequence import Event, Failed, Finished, Job, Sequence, TextDelta
from serving.llamacpp.speculation import Speculation
from serving.protocol.responses import TokenLogprob

GREEDY = SamplingParams(temperature=0)


class Bench:
    """Runs jobs, and keeps what each sequence brought: its text, log-probabilities and end.

    ``at_first_text`` is called on the scheduler's thread once a sequence has begun to answer.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        slots: int = 4,
        context_length: int = 512,
        batch_tokens: int = 128,
        kv_tokens: int | None = None,
        store_bytes: int = 1 << 28,
        speculation: Speculation | None = None,
        step_timeout_seconds: float = 120.0,
    ) -> None:
        self.model = Model(model_path, gpu_layers=0)
        self.context = Context(
            self.model,
            slots=slots,
            context_length=context_length,
            batch_tokens=batch_tokens,
            threads=1,
            kv_tokens=kv_tokens,
        )
        self.scheduler = Scheduler(
            self.model,
            self.context,
            max_queue=10_000,
            store_bytes=store_bytes,
            speculation=speculation,
            step_timeout_seconds=step_timeout_seconds,
            emit=self._take,
        )
        self.text: dict[Sequence, str] = {}
        self.logprobs: dict[Sequence, list[TokenLogprob]] = {}
        self.order: list[Sequence] = []
        self.at_first_text: Callable[[], object] | None = None
        self._ends: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        self.scheduler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.scheduler.stop()
        self.context.close()
        self.model.close()

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if not isinstance(event, TextDelta):
                self._ends.put(event)
                continue
            if event.sequence not in self.text:
                self.order.append(event.sequence)
            self.text[event.sequence] = self.text.get(event.sequence, "") + event.text
            self.logprobs.setdefault(event.sequence, []).extend(event.logprobs)
            action, self.at_first_text = self.at_first_text, None
            if action is not None:
                action()

    def tokens(self, text: str) -> list[int]:
        """A prompt's tokens."""
        return self.model.tokenize(text, add_special=True, parse_special=True)

    def submit(
        self,
        prompt: str | list[int],
        *,
        limit: int = 16,
        choices: int = 1,
        params: SamplingParams = GREEDY,
        images: Iterable[Image] = (),
        **job: Any,
    ) -> Job:
        """Start a job; it generates exactly ``limit`` tokens for each choice."""
        submitted = Job(ignore_eos=True, **job)
        tokens = self.tokens(prompt) if isinstance(prompt, str) else prompt
        submitted.add(
            tokens, limit=limit, params=[params] * choices, stop_strings=(), images=images
        )
        self.scheduler.submit(submitted)
        return submitted

    def ends(self, count: int) -> list[Finished | Failed]:
        """Wait for the ends of so many sequences."""
        return [self._ends.get(timeout=60) for _ in range(count)]

    def run(self, prompt: str | list[int], **options: Any) -> Job:
        """Submit a job and wait for its end."""
        job = self.submit(prompt, **options)
        ends = self.ends(len(job.sequences))
        assert all(isinstance(end, Finished) for end in ends), ends
        return job

    def generated(self, job: Job) -> list[int]:
        """The tokens that the job's only sequence generated."""
        (sequence,) = job.sequences
        return sequence.tokens[sequence.prompt_tokens :]
