"""What the scheduler works on: jobs (requests) and their sequences. State is data; the rest is derived."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from serving.llamacpp.grammar import Grammar, Matcher
from serving.llamacpp.runtime import Image, ImageRows, LoraAdapter, Sampler
from serving.llamacpp.sampling import SamplingParams
from serving.llamacpp.speculation import Speculator
from serving.llamacpp.text import TextStream
from serving.protocol.responses import FinishReason, Timings, TokenLogprob, Usage
from serving.protocol.tenancy import Priority


class Phase(Enum):
    """A sequence's life: WAITING → PREFILL → DECODE → DONE.

    Any phase may end in DONE (cancelled, failed); a preempted sequence goes back to WAITING.
    """

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making.

    ``tokens`` is the prompt followed by everything generated; the first ``computed`` of them are in
    the KV cells of ``slot``. ``limit`` is the most tokens it may generate. While it has a ``leader`` it
    waits for that sequence to compute the prefix they share. ``prefilled`` and ``cached`` count prompt
    tokens: ever in cells, and found there rather than computed. Where one of the ``images`` lies,
    ``tokens`` holds numbers below zero.
    """

    job: Job
    index: int
    prompt_tokens: int
    tokens: list[int]
    limit: int
    params: SamplingParams
    text: TextStream
    images: list[Image]
    phase: Phase = Phase.WAITING
    slot: int = -1
    computed: int = 0
    prefilled: int = 0
    cached: int = 0
    leader: Sequence | None = None
    sampler: Sampler | None = None
    matcher: Matcher | None = None
    speculator: Speculator | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    prefill_busy_seconds: float = 0.0
    decode_busy_seconds: float = 0.0
    pending_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """Tokens sampled so far, the one that ends generation included."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's own tokens are still to be told."""
        wanted = self.job.echo and self.job.top_logprobs is not None
        return wanted and self.first_token_at is None

    @property
    def done(self) -> bool:
        """Whether nothing more will be generated."""
        return self.phase is Phase.DONE

    @property
    def owner(self) -> Job:
        """For whom it is generated."""
        return self.job

    @property
    def is_starting(self) -> bool:
        """Whether it computes its prompt, or has yet to."""
        return self.phase in (Phase.WAITING, Phase.PREFILL)

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before the next can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def image(self) -> Image | None:
        """The image that is to be computed next; None if text is."""
        return next((i for i in self.images if i.start <= self.computed < i.end), None)

    @property
    def stretch(self) -> int:
        """Tokens still to be computed of the image, or of the text up to the next."""
        borders = (border for image in self.images for border in (image.start, image.end))
        ahead = (border - self.computed for border in borders if border > self.computed)
        return min(ahead, default=self.remaining)

    def goes_with(self, other: Sequence) -> bool:
        """Whether both can be computed in one batch: text with text, and causal images with such."""
        if self.image is None or other.image is None:
            return self.image is other.image
        return self.image.is_causal and other.image.is_causal

    def image_rows(self, count: int) -> ImageRows:
        """The next rows of the image that is to be computed."""
        assert self.image is not None
        first = self.computed - self.image.start
        return self.image.rows(first, count, self.position(self.image.start))

    def position(self, length: int) -> int:
        """Where in its context the token after the first ``length`` stands."""
        return length - sum(i.saved_positions for i in self.images if i.end <= length)


@dataclass(slots=True, eq=False)
class Job:
    """One request: its prompts' sequences, and what they have in common.

    ``top_logprobs`` None means that no log-probabilities are wanted. ``echo`` repeats the prompt before
    the completion. ``show_control_tokens`` renders control tokens as text, for who parses the text.
    Tenants of a class share the engine by ``weight``; ``batch`` gives way to ``interactive``.
    """

    ignore_eos: bool = False
    top_logprobs: int | None = None
    echo: bool = False
    grammar: Grammar | None = None
    show_control_tokens: bool = False
    adapter: LoraAdapter | None = None
    tenant: str = "-"
    weight: float = 1.0
    priority: Priority = "interactive"
    arrived_at: float = field(default_factory=time.monotonic)
    sequences: list[Sequence] = field(default_factory=list)

    def add(
        self,
        prompt: list[int],
        *,
        limit: int,
        params: list[SamplingParams],
        stop_strings: tuple[str, ...],
        images: Iterable[Image] = (),
    ) -> None:
        """Add a completion of ``prompt``, in which ``images`` lie, with each of ``params``."""
        for choice_params in params:
            self.sequences.append(
                Sequence(
                    job=self,
                    index=len(self.sequences),
                    prompt_tokens=len(prompt),
                    tokens=list(prompt),
                    limit=limit,
                    params=choice_params,
                    text=TextStream(stop_strings),
                    images=list(images),
                )
            )

    @property
    def done(self) -> bool:
        """Whether nothing remains to be generated."""
        return all(sequence.done for sequence in self.sequences)

    def usage(self, choices: int) -> Usage:
        """Tokens so far; each prompt counts once, however many ``choices`` were made of it.

        Of a job that was cancelled early, prompts count as far as they were computed.
        """
        furthest = [
            max(self.sequences[first : first + choices], key=lambda s: s.prefilled)
            for first in range(0, len(self.sequences), choices)
        ]
        return Usage(
            prompt_tokens=sum(sequence.prefilled for sequence in furthest),
            cached_tokens=sum(sequence.cached for sequence in furthest),
            completion_tokens=sum(sequence.generated for sequence in self.sequences),
        )

    def timings(self) -> Timings:
        """Where the time went, up to the end of the last sequence, or up to now."""
        now = time.monotonic()
        ends = [now if s.finished_at is None else s.finished_at for s in self.sequences]
        end = max(ends, default=now)
        admitted = _earliest(end, (sequence.admitted_at for sequence in self.sequences))
        first_token = _earliest(end, (sequence.first_token_at for sequence in self.sequences))
        return Timings(
            queue_seconds=admitted - self.arrived_at,
            prefill_seconds=first_token - admitted,
            decode_seconds=end - first_token,
            prefill_busy_seconds=sum(s.prefill_busy_seconds for s in self.sequences),
            decode_busy_seconds=sum(s.decode_busy_seconds for s in self.sequences),
        )


def _earliest(otherwise: float, moments: Iterable[float | None]) -> float:
    return min((moment for moment in moments if moment is not None), default=otherwise)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of a sequence."""

    sequence: Sequence
    text: str
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence is complete; ``reason`` None means that it was cancelled."""

    sequence: Sequence
    reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence could not go on."""

    sequence: Sequence
    message: str


Event = TextDelta | Finished | Failed
