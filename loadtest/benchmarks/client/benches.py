"""Runs `rigserve bench` and reads its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def bench(out: Path, url: str, *arguments: str) -> dict[str, Any]:
    """A report as JSON; raises ``RuntimeError`` when the bench fails."""
    command = [sys.executable, "-m", "serving", "bench", "--url", url, "--out", str(out)]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(
            f"rigserve bench ended with {ended.returncode}:\n{ended.stderr}\n{ended.stdout[-3000:]}"
        )
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report
