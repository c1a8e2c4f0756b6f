"""Programs that are not rigserve's, for the tests of what they read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import programs


def program(name: str) -> str:
    """Where it is; skips the test that needs it where it cannot be had."""
    found = programs.find(name)
    if found is None:
        pytest.skip(f"there is no {name}, and `python -m tools.programs` could not fetch it")
    return str(found)


def run(name: str, *words: str | Path, folder: Path | None = None) -> str:
    """What it prints; fails with that if it fails."""
    done = subprocess.run(
        [program(name), *map(str, words)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
