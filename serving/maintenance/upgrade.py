"""What a new version of rigserve will do to the databases of an older one: tried on copies, before it is done."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.adapters.store import AdapterStore
from serving.cost.ledger import Ledger, LedgerError
from serving.database import DatabaseError
from serving.gateway.batch_store import BatchStore
from serving.gateway.file_store import FileStore
from serving.gateway.response_store import ResponseStore
from serving.keys.store import KeyStore
from serving.maintenance.backup import BackupError, copy_database


class _Opened(Protocol):
    def close(self) -> None: ...


DATABASES: dict[str, Callable[[Path], _Opened]] = {
    "ledger.sqlite": Ledger,
    "keys.sqlite": lambda path: KeyStore(path.parent),
    "responses.sqlite": ResponseStore,
    "files.sqlite": lambda path: FileStore(path.parent),
    "batches.sqlite": lambda path: BatchStore(path.parent),
    "adapters.sqlite": lambda path: AdapterStore(path.parent),
}
"""Those of a data folder, and how a server opens them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a database: its formats before and after, or why it cannot be taken on."""

    name: str
    before: int
    after: int | None
    problem: str | None = None


def check_upgrade(data_dir: Path) -> list[Outcome]:
    """Open a copy of each database as a server would at its start; nothing of the original changes."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="rigserve-upgrade-") as folder:
        for name, opener in DATABASES.items():
            if (data_dir / name).exists():
                outcomes.append(_tried(data_dir / name, Path(folder) / name, opener))
    return outcomes


def _tried(database: Path, copy: Path, opener: Callable[[Path], _Opened]) -> Outcome:
    before = 0
    try:
        before = copy_database(database, copy)
        rows = _rows(copy)
        opener(copy).close()
        after, lost = _format(copy), _lost(rows, _rows(copy))
    except (BackupError, DatabaseError, LedgerError, sqlite3.Error) as error:
        return Outcome(database.name, before, None, str(error).replace(str(copy), str(database)))
    if lost:
        return Outcome(database.name, before, None, f"rows would be lost: {', '.join(lost)}")
    return Outcome(database.name, before, after)


def _format(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _rows(database: Path) -> dict[str, int]:
    """Number of rows by table."""
    with closing(sqlite3.connect(database)) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        )
        return {
            name: connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
            for (name,) in tables.fetchall()
        }


def _lost(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return [name for name, count in before.items() if after.get(name, 0) < count]
