"""What the example of a fine-tune learns: a company's way of answering, which the base model does not have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PATH = Path(__file__).with_name("examples.json")


@dataclass(frozen=True, slots=True)
class Examples:
    """Pairs of question and answer to learn from, and questions held out to measure with."""

    opening: str
    closing: str
    training: tuple[tuple[str, str], ...]
    held_out: tuple[str, ...]

    @classmethod
    def read(cls) -> Self:
        """Those of ``examples.json`` beside this file."""
        content = json.loads(_PATH.read_bytes())
        opening, closing = content["opening"], content["closing"]
        training = tuple(
            (question, f"{opening} {answer} {closing}") for question, answer in content["training"]
        )
        return cls(opening, closing, training, tuple(content["held_out"]))

    def is_shown_by(self, answer: str) -> bool:
        """Whether an answer begins and ends as the company's do."""
        text = answer.strip()
        return text.startswith(self.opening) and text.endswith(self.closing)
