"""The settings that are tried: some keys of a model's config, each with a few values."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from serving.config import (
    LlamaCppModel,
    LlamaServerModel,
    ModelConfig,
    VllmModel,
)
from serving.config.schema import VllmSpeculation
from serving.hardware.cpu import physical_cores
from serving.planner.quality import loss_of

Point = tuple[int, ...]
"""For each key the number of one of its values; zeros are the base."""

# Of types close in size the better ones, and Q4_0, which processors have the fastest kernels for.
_TYPES = ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0")
_BATCHES = (128, 256, 512, 1024, 2048)
_VLLM_BATCHES = (None, 512, 2048, 8192)
_MOST_SEQUENCES = 256


@dataclass(frozen=True)
class Space:
    """What to try of one engine, beginning from ``base``; the first value of each key is the base's.

    ``expected`` are logarithms of how many times the base's tokens a value is predicted to give, by (key, value).
    """

    base: ModelConfig
    values: Mapping[str, tuple[Any, ...]]
    expected: Mapping[tuple[str, Any], float] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """Its name in a config."""
        return self.base.engine

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each key has."""
        return tuple(len(values) for values in self.values.values())

    @property
    def start(self) -> Point:
        """The base itself."""
        return (0,) * len(self.values)

    def changes(self, point: Point) -> dict[str, Any]:
        """The keys whose values are not the base's."""
        return {
            key: values[number]
            for (key, values), number in zip(self.values.items(), point, strict=True)
            if number
        }

    def model(self, point: Point) -> ModelConfig:
        """The model with the values of a point; raises ``ValueError`` for values that do not go together."""
        set_keys = {key: getattr(self.base, key) for key in self.base.model_fields_set}
        try:
            return type(self.base).model_validate(set_keys | self.changes(point))
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from error


def identity(model: ModelConfig) -> str:
    """The same for settings that are the same."""
    told = model.model_dump(mode="json", exclude_defaults=True) | {"engine": model.engine}
    return json.dumps(told, sort_keys=True)


def types_for(current: str | None, most_loss: float) -> Iterator[str]:
    """Quantizations that lose so much at most, as a share of perplexity, or no more than the current one."""
    allowed = max(most_loss, (loss_of(current) or 0.0) if current else 0.0)
    for name in _TYPES:
        loss = loss_of(name)
        if name != current and loss is not None and loss <= allowed:
            yield name


def gguf_space(
    base: LlamaCppModel | LlamaServerModel,
    *,
    users: int,
    types: Sequence[str],
    computes_on_cpu: bool,
    expected: Mapping[tuple[str, Any], float],
) -> Space:
    """For llama.cpp's engines."""
    values: dict[str, tuple[Any, ...]] = {
        "quantization": (base.quantization, *types),
        "max_batch_tokens": _with_first(base.max_batch_tokens, _BATCHES),
        "max_sequences": _with_first(base.max_sequences, _sequences(users)),
        "kv_type": _with_first(base.kv_type, ("F16", "BF16", "Q8_0")),
        "flash_attention": _with_first(base.flash_attention, (True, False)),
    }
    if computes_on_cpu:
        values["threads"] = _threads(base.threads)
    if isinstance(base, LlamaCppModel) and base.speculation != "draft_model":
        values["speculation"] = _with_first(base.speculation, ("none", "prompt_lookup"))
    if isinstance(base, LlamaCppModel) and base.speculation == "draft_model":
        values["speculation"] = ("draft_model",)
    return Space(base, {key: each for key, each in values.items() if len(each) > 1}, expected)


def vllm_space(base: VllmModel, *, users: int, has_cards: bool, computes_fp8: bool) -> Space:
    """For vLLM, in 16 bits and, where the card computes in it, in FP8."""
    values: dict[str, tuple[Any, ...]] = {
        "max_batch_tokens": _with_first(base.max_batch_tokens, _VLLM_BATCHES),
        "max_sequences": _with_first(base.max_sequences, _sequences(users)),
        "speculation": _with_first(
            base.speculation, (None, VllmSpeculation(method="ngram", tokens=3))
        ),
        "extra_args": _with_first(base.extra_args, ((*base.extra_args, "--enforce-eager"),)),
    }
    if has_cards and computes_fp8:
        values["quantization"] = _with_first(base.quantization, (None, "fp8"))
        values["kv_cache_dtype"] = _with_first(base.kv_cache_dtype, ("auto", "fp8"))
    if not has_cards:
        values["threads"] = _threads(base.threads)
    return Space(base, {key: each for key, each in values.items() if len(each) > 1})


def _with_first(first: Any, others: Sequence[Any]) -> tuple[Any, ...]:
    return (first, *(each for each in others if each != first))


def _sequences(users: int) -> tuple[int, ...]:
    """A slot for each user, twice as many, or half as many, so that steps are small."""
    counts = {users, min(2 * users, _MOST_SEQUENCES), -(-users // 2)}
    return tuple(sorted(counts, reverse=True))


def _threads(current: int | None) -> tuple[int | None, ...]:
    cores, logical = physical_cores(), len(os.sched_getaffinity(0))
    counts = {cores, logical, max(cores // 2, 1), max(cores - 1, 1)}
    first = current or cores
    return (current, *sorted(counts - {first}, reverse=True))
