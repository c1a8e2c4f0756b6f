"""Where rows wait that a database cannot take: files of JSON lines, each written whole, then read and removed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_SUFFIX = ".jsonl"

Row = tuple[Any, ...]


class Spool:
    """A folder that several processes may use: whoever can write the rows removes their file.

    Rows are read twice when two processes do so at once, or one ends between writing and removing: they
    need a value of their own by which the database knows them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # How many this process has put there and knows to be there.
        self.rows = 0

    def add(self, rows: Sequence[Row]) -> bool:
        """Write rows to disk, all or none; tells whether that could be done."""
        if not rows:
            return True
        name = f"{time.time_ns()}-{secrets.token_hex(4)}"
        part = self.folder / f"{name}.part"
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            try:
                with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(part.with_suffix(_SUFFIX))
            except OSError:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
        except OSError as error:
            _log.error("cannot write to %s: %s", self.folder, error.strerror)
            return False
        self.rows += len(rows)
        return True

    def files(self) -> list[Path]:
        """What there is to read, the oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(self.folder.glob(f"*{_SUFFIX}"))

    def read(self, files: Iterable[Path]) -> Iterator[Row]:
        """The rows of files; a file that another process has removed meanwhile has none."""
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                for line in file.read_bytes().splitlines():
                    try:
                        yield tuple(json.loads(line))
                    except (TypeError, ValueError):
                        _log.error("a line of %s makes no sense: %r", file, line)

    def remove(self, files: Iterable[Path]) -> None:
        """Forget files whose rows are in the database."""
        for file in files:
            file.unlink(missing_ok=True)
        self.rows = 0
