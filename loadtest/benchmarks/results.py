"""Where a benchmark's report goes."""

from __future__ import annotations

from pathlib import Path


def publish(report: str, out: Path | None) -> None:
    """Print Markdown, and append it to a file if there is one."""
    print(report)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(report)
