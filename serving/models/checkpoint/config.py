"""A Hugging Face model's ``config.json``: what the conversion asks of it, with the key in every error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

FILE = "config.json"
# What transformers takes where a config of theirs says nothing.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "Gemma3ForConditionalGeneration": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
    },
    "Qwen2ForCausalLM": {"use_sliding_window": False},
    "Qwen2MoeForCausalLM": {"use_sliding_window": False},
    "Qwen3ForCausalLM": {"use_sliding_window": False},
    "Qwen3MoeForCausalLM": {"use_sliding_window": False},
}


class UnfitCheckpoint(Exception):
    """A folder that cannot be converted without changing what its model does; the message says why."""


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a model of text; of one that sees, too, those of its text part."""

    architecture: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises :class:`UnfitCheckpoint` and OSError."""
        try:
            values = json.loads((folder / FILE).read_bytes())
            architecture = str(values["architectures"][0])
            values = {
                **_DEFAULTS.get(architecture, {}),
                **values,
                **values.get("text_config", {}),
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise UnfitCheckpoint(
                f"its {FILE} does not say which architecture it is of ({error!r})"
            ) from error
        return cls(architecture, values)

    def get(self, key: str) -> Any:
        """The value; None if it is missing or null."""
        return self.values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises :class:`UnfitCheckpoint` if there is none."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UnfitCheckpoint(f"{key} in its {FILE} is {value!r}; a whole number is needed")
        return value

    def number(self, key: str) -> float:
        """Raises :class:`UnfitCheckpoint` if there is none."""
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnfitCheckpoint(f"{key} in its {FILE} is {value!r}; a number is needed")
        return float(value)

    def require(self, key: str, *allowed: Any, why: str) -> None:
        """Raise :class:`UnfitCheckpoint` unless the value is one of those that llama.cpp computes with."""
        if self.values.get(key) not in allowed:
            raise UnfitCheckpoint(f"{key} in its {FILE} is {self.values.get(key)!r}: {why}")

    @property
    def layers(self) -> int:
        """How many."""
        return self.integer("num_hidden_layers")

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.integer("num_attention_heads")

    @property
    def key_value_heads(self) -> int:
        """Of keys and values."""
        return self.integer("num_key_value_heads", self.heads)

    @property
    def head_width(self) -> int:
        """Values of a head."""
        return self.integer("head_dim", self.integer("hidden_size") // self.heads)
