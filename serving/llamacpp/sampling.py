"""How the next token is chosen: the parameters, and log-probabilities for those who ask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.protocol.requests import GenerationRequest


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

    @staticmethod
    def of(request: GenerationRequest, seed: int) -> SamplingParams:
        """The request's settings, with OpenAI's defaults where it is silent."""
        bias = tuple((int(token), value) for token, value in (request.logit_bias or {}).items())
        return SamplingParams(
            temperature=1.0 if request.temperature is None else request.temperature,
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
