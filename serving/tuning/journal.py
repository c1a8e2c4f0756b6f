"""What was measured, on disk: one that is interrupted goes on where it was."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from pathlib import Path

from serving.config import ModelConfig
from serving.folders import make_private
from serving.tuning.goal import Failed, Measured, Result
from serving.tuning.space import identity


class Journal:
    """The results of one search, in the order in which they were measured, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        """Read what is there; raises OSError. A last line that was broken off is dropped."""
        self.path = path
        self._known: dict[tuple[str, int], deque[tuple[Result, float]]] = defaultdict(deque)
        make_private(path.parent)
        whole = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                entry = json.loads(line)
            except ValueError:
                break
            whole.append(line)
            told = entry["result"]
            result = Failed(told["reason"]) if "reason" in told else Measured(**told)
            self._known[entry["model"], entry["rounds"]].append((result, entry["seconds"]))
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        self.entries = len(whole)

    def take(self, model: ModelConfig, rounds: int) -> tuple[Result, float] | None:
        """A result that was not taken yet, and the seconds it took; None if there is none."""
        known = self._known[identity(model), rounds]
        return known.popleft() if known else None

    def append(self, model: ModelConfig, rounds: int, result: Result, seconds: float) -> None:
        """Keep a new one; raises OSError."""
        told = {"reason": result.reason} if isinstance(result, Failed) else result.as_json()
        entry = {
            "model": identity(model),
            "rounds": rounds,
            "seconds": round(seconds, 3),
            "result": told,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
