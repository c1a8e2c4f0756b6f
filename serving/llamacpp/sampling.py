"""How the next token is chosen: the parameters, and log-probabilities for those who ask."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.protocol.requests import GenerationRequest

# Below it the likeliest token is as good as certain, and far below it logits overflow.
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Settings of one sequence's sampler; the defaults change nothing.

    ``temperature`` 0 is greedy. ``top_k`` 0 keeps all tokens. Penalties count generated tokens only.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken as the logits have it."""
        return self.temperature == 0 and not (
            self.logit_bias or self.frequency_penalty or self.presence_penalty
        )

    @staticmethod
    def of(request: GenerationRequest, seed: int) -> SamplingParams:
        """The request's settings, with OpenAI's defaults where it is silent."""
        temperature = 1.0 if request.temperature is None else request.temperature
        bias = tuple((int(token), value) for token, value in (request.logit_bias or {}).items())
        return SamplingParams(
            temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
            top_k=max(request.top_k or 0, 0),
            top_p=1.0 if request.top_p is None else request.top_p,
            min_p=request.min_p or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=bias,
            seed=seed,
        )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of the raw logits, before temperature, penalties and bias."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def top_tokens(logprobs: NDArray[np.float64], count: int) -> list[int]:
    """The ``count`` likeliest tokens, likeliest first."""
    if count == 0:
        return []
    candidates = np.argpartition(logprobs, -count)[-count:]
    return [int(token) for token in candidates[np.argsort(-logprobs[candidates])]]


# Below this many logits in all, handing work to other threads costs more than it saves.
_WORTH_THREADS = 1_000_000
_MAX_THREADS = 8


class SamplingThreads:
    """Samples the sequences of a batch side by side: llama.cpp's samplers run without Python's lock."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="sampling")

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks, one a sequence; raises what one of them raised."""
        if self._threads == 1 or len(tasks) * self._vocab_size < _WORTH_THREADS:
            _run_all(tasks)
        else:
            shares = [tasks[first :: self._threads] for first in range(self._threads)]
            list(self._pool.map(_run_all, shares))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _run_all(tasks: Sequence[Callable[[], None]]) -> None:
    for task in tasks:
        task()
