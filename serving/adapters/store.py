"""The added adapters of a data folder, in SQLite. Their files stay where they are."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.adapters.added import AddedAdapter
from serving.config import AdapterConfig
from serving.database import open_database
from serving.protocol.errors import ApiError

_SCHEMA_VERSION = 1
_CREATE = (
    """
    CREATE TABLE adapters (
        name TEXT PRIMARY KEY,
        model TEXT NOT NULL,
        path TEXT NOT NULL,
        scale REAL NOT NULL,
        sha256 TEXT NOT NULL,
        added_at REAL NOT NULL
    )
    """,
)


class AdapterStore:
    """Remembers what was added. Methods block, may be called by any thread, and raise :class:`ApiError`."""

    def __init__(self, data_dir: Path) -> None:
        """Open or create the database; raises ``DatabaseError``."""
        self._connection = open_database(
            data_dir / "adapters.sqlite", version=_SCHEMA_VERSION, create=_CREATE
        )
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def all(self) -> list[AddedAdapter]:
        """All of them, the oldest first."""
        with self._used() as connection:
            rows = connection.execute(
                "SELECT name, model, path, scale, sha256, added_at FROM adapters ORDER BY added_at"
            )
            return [
                AddedAdapter(
                    model, AdapterConfig(name=name, path=path, scale=scale, sha256=sha256), added_at
                )
                for name, model, path, scale, sha256, added_at in rows
            ]

    def put(self, added: AddedAdapter) -> None:
        """Remember one, in place of another of its name."""
        adapter = added.adapter
        row = (adapter.name, added.model, adapter.path, adapter.scale, adapter.sha256)
        with self._used() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO adapters VALUES (?, ?, ?, ?, ?, ?)", (*row, added.added_at)
            )

    def remove(self, name: str) -> bool:
        """Forget one; false if there is none of that name."""
        with self._used() as connection:
            done = connection.execute("DELETE FROM adapters WHERE name = ?", (name,))
            return done.rowcount > 0

    @contextmanager
    def _used(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                yield self._connection
        except sqlite3.Error as error:
            raise ApiError(
                503,
                f"The added adapters cannot be read or written now: {error}.",
                code="storage_unavailable",
            ) from error
