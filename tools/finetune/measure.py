"""Asks several models the same questions at the same time, and counts who answers in the company's way."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tools.finetune.examples import Examples

_ANSWER_TOKENS = 64
_SECONDS = 300.0


def shares(
    base_url: str, models: Sequence[str], examples: Examples, *, clients: int, questions: int
) -> dict[str, float]:
    """Of the first so many held-out questions, the share that each model answers in the company's way.

    The models are asked in turn, by so many clients at once, so that all of them have requests in flight together.
    """
    asked = [(model, question) for question in examples.held_out[:questions] for model in models]
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda pair: answer(base_url, *pair), asked))
    shown = dict.fromkeys(models, 0)
    for (model, _), text in zip(asked, answers, strict=True):
        shown[model] += examples.is_shown_by(text)
    return {model: count / questions for model, count in shown.items()}


def answer(base_url: str, model: str, question: str) -> str:
    """What a model says, as certain of itself as it is."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": _ANSWER_TOKENS,
        "temperature": 0,
    }
    request = urllib.request.Request(  # noqa: S310 (the caller's own server)
        f"{base_url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_SECONDS) as response:  # noqa: S310 (as above)
        told: dict[str, Any] = json.load(response)
    text: str = told["choices"][0]["message"]["content"]
    return text
