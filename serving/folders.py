"""How folders are made that are nobody's but their owner's: those of data, and of prepared weights."""

from __future__ import annotations

from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder, if need be, and those above it that are missing: only their owner can enter. Raises OSError.

    ``Path.mkdir`` has its mode for the last one only, so who came first by way of a folder within would open the others.
    """
    for each in (*reversed(folder.parents), folder):
        each.mkdir(mode=0o700, exist_ok=True)
