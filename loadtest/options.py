"""What a bench is told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from serving.config import CostConfig

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """A load test's settings; ``report.json`` repeats them all but the key.

    ``url`` ends in ``/v1``. ``model`` None is the first that the server lists, ``api_key`` None is
    ``$OPENAI_API_KEY``, ``out`` None a new folder named after the time.
    """

    url: str
    model: str | None
    api_key: str | None
    users: int
    duration_seconds: float
    prompt_tokens: int
    output_tokens: int
    out: Path | None
    web: bool
    seed: int
    cost: CostConfig

    def to_json(self) -> str:
        """For the process that runs the bench."""
        return _ADAPTER.dump_json(self).decode()

    @staticmethod
    def from_json(text: str) -> BenchOptions:
        """The other end of :meth:`to_json`."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(BenchOptions)


def parse_duration(text: str) -> float:
    """``30s``, ``2m``, ``1h``, ``7d`` or plain seconds, in seconds; raises ``ValueError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is not a duration; write 30s, 2m, 1h or 7d")
    return float(match[1]) * _UNITS[match[2]]
