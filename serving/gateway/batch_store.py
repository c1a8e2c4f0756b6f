"""Batches and their lines, in SQLite: what is done is done once, whatever dies in between."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import orjson

from serving.database import open_database
from serving.gateway.file_store import storage_error
from serving.protocol.batches import ENDED, Line, total_usage
from serving.protocol.errors import ApiError
from serving.protocol.tenancy import NO_TENANT

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_SCHEMA_VERSION = 2
# What a column says stands in the batch itself: the two cannot differ.
_CREATE = (
    """
    CREATE TABLE batches (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        body TEXT NOT NULL,
        output_keep_seconds INTEGER,
        tenant TEXT NOT NULL DEFAULT '-',
        key_id TEXT,
        status TEXT GENERATED ALWAYS AS (json_extract(body, '$.status'))
    )
    """,
    "CREATE INDEX batches_status ON batches (status)",
    # A line is done when it has a result: one statement makes it both.
    """
    CREATE TABLE lines (
        batch_id TEXT NOT NULL,
        number INTEGER NOT NULL,
        custom_id TEXT NOT NULL,
        body BLOB NOT NULL,
        failed INTEGER,
        result BLOB,
        PRIMARY KEY (batch_id, number)
    )
    """,
    "CREATE INDEX lines_failed ON lines (batch_id, failed)",
)
_UPGRADES = {
    1: (
        "ALTER TABLE batches ADD COLUMN tenant TEXT NOT NULL DEFAULT '-'",
        "ALTER TABLE batches ADD COLUMN key_id TEXT",
    )
}
_ENDED = ", ".join(f"'{status}'" for status in ENDED)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a batch is, and the API key that it is run with; None where it was made without one."""

    tenant: str = NO_TENANT
    key_id: str | None = None


class BatchStore:
    """Keeps batches in a database that other processes may use too; one of them at a time runs them.

    A batch is its tenant's: others do not find it.

    All methods that wait raise :class:`ApiError` (503, 507) while the database cannot be used.
    """

    def __init__(self, data_dir: Path) -> None:
        """Open or create the database; raises ``DatabaseError``."""
        self._path = data_dir / "batches.sqlite"
        self._connection = open_database(
            self._path, version=_SCHEMA_VERSION, create=_CREATE, upgrades=_UPGRADES
        )
        self._connection.execute("PRAGMA secure_delete=ON")
        # The system lets go of it when its holder dies.
        self._running = filelock.FileLock(f"{self._path}.lock", mode=0o600, thread_local=False)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def close(self) -> None:
        """Finish what was begun, and close; another process may run the batches then."""
        self._thread.shutdown()
        self._connection.close()
        self._running.release()

    async def claim(self) -> bool:
        """Whether it is this process that runs the batches; once it is, it stays so until it ends."""
        return await self._run(self._claim)

    async def add(
        self, batch: dict[str, Any], output_keep_seconds: int | None, owner: Owner = Owner()
    ) -> None:
        """Keep a new batch; returns once it is written."""
        await self._run(
            lambda: self._connection.execute(
                "INSERT INTO batches (id, body, output_keep_seconds, tenant, key_id) "
                "VALUES (?, ?, ?, ?, ?)",
                (batch["id"], _text(batch), output_keep_seconds, owner.tenant, owner.key_id),
            )
        )

    async def get(self, batch_id: str, tenant: str = NO_TENANT) -> dict[str, Any] | None:
        """A batch with its ``request_counts``; None if there is none of that id."""
        return await self._run(lambda: self._get(batch_id, tenant))

    async def page(
        self, after: str | None, limit: int, tenant: str = NO_TENANT
    ) -> list[dict[str, Any]]:
        """Up to ``limit`` batches, the newest first; raises :class:`ApiError` if ``after`` is none."""
        return await self._run(lambda: self._list(after, limit, tenant))

    async def unfinished(self) -> list[tuple[dict[str, Any], Owner]]:
        """The batches of all tenants that have not ended, without counts, the oldest first."""
        query = (
            "SELECT body, tenant, key_id FROM batches "
            f"WHERE status NOT IN ({_ENDED}) ORDER BY number"
        )
        rows = await self._run(lambda: self._connection.execute(query).fetchall())
        return [(orjson.loads(row[0]), Owner(*row[1:])) for row in rows]

    async def start(self, batch_id: str, lines: list[Line], model: str) -> None:
        """A batch is valid: keep its lines, and begin."""
        await self._run(lambda: self._start(batch_id, lines, model))

    async def move(self, batch_id: str, source: tuple[str, ...], status: str, **more: Any) -> bool:
        """Give a batch a new status, its time, and ``more`` if it still has one of ``source``."""
        return await self._run(lambda: self._move(batch_id, source, status, more))

    async def pending(self, batch_id: str, after: int, limit: int) -> list[Line]:
        """The next lines without a result, from the one behind line ``after`` on."""
        rows = await self._run(
            lambda: self._connection.execute(
                "SELECT number, custom_id, body FROM lines WHERE batch_id = ? AND number > ? "
                "AND result IS NULL ORDER BY number LIMIT ?",
                (batch_id, after, limit),
            ).fetchall()
        )
        return [Line(*row) for row in rows]

    async def settle(
        self, batch_id: str, number: int, result: dict[str, Any], *, failed: bool
    ) -> bool:
        """Keep a line's result; False: it has one already, which stays."""
        written = orjson.dumps(result)
        return await self._run(
            lambda: (
                self._connection.execute(
                    "UPDATE lines SET result = ?, failed = ? "
                    "WHERE batch_id = ? AND number = ? AND result IS NULL",
                    (written, failed, batch_id, number),
                ).rowcount
                > 0
            )
        )

    async def results(
        self, batch_id: str, after: int, limit: int, *, failed: bool
    ) -> list[tuple[int, bytes]]:
        """The next lines with a result, and the results."""
        return await self._run(
            lambda: self._connection.execute(
                "SELECT number, result FROM lines "
                "WHERE batch_id = ? AND failed = ? AND number > ? ORDER BY number LIMIT ?",
                (batch_id, failed, after, limit),
            ).fetchall()
        )

    async def output_keep_seconds(self, batch_id: str) -> int | None:
        """How long a batch's output is kept."""
        query = "SELECT output_keep_seconds FROM batches WHERE id = ?"
        row = await self._run(lambda: self._connection.execute(query, (batch_id,)).fetchone())
        kept: int | None = row[0]
        return kept

    async def end(self, batch_id: str, source: str, status: str, **more: Any) -> bool:
        """As :meth:`move`, and forget the lines: their results are in files by now."""
        return await self._run(lambda: self._end(batch_id, source, status, more))

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            _log.error("cannot use the batches in %s: %s", self._path, error)
            raise storage_error(error) from error

    def _claim(self) -> bool:
        if self._running.is_locked:
            return True
        try:
            self._running.acquire(blocking=False)
        except filelock.Timeout:
            return False
        return True

    def _get(self, batch_id: str, tenant: str) -> dict[str, Any] | None:
        query = "SELECT body FROM batches WHERE id = ? AND tenant = ?"
        row = self._connection.execute(query, (batch_id, tenant)).fetchone()
        return None if row is None else self._counted(orjson.loads(row[0]))

    def _list(self, after: str | None, limit: int, tenant: str) -> list[dict[str, Any]]:
        start = None
        if after is not None:
            row = self._connection.execute(
                "SELECT number FROM batches WHERE id = ? AND tenant = ?", (after, tenant)
            ).fetchone()
            if row is None:
                raise ApiError(
                    400, f"No batch has the id '{after}'.", param="after", code="invalid_value"
                )
            start = row[0]
        rows = self._connection.execute(
            "SELECT body FROM batches WHERE tenant = ? AND (? IS NULL OR number < ?) "
            "ORDER BY number DESC LIMIT ?",
            (tenant, start, start, limit),
        ).fetchall()
        return [self._counted(orjson.loads(row[0])) for row in rows]

    def _counted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its counts: those of its lines, or what it ended with."""
        return batch if "request_counts" in batch else {**batch, **self._counts(batch["id"])}

    def _counts(self, batch_id: str) -> dict[str, Any]:
        total, failed, done = self._connection.execute(
            "SELECT count(*), coalesce(sum(failed), 0), count(failed) FROM lines WHERE batch_id = ?",
            (batch_id,),
        ).fetchone()
        return {"request_counts": {"total": total, "completed": done - failed, "failed": failed}}

    def _usage(self, batch_id: str) -> dict[str, Any]:
        rows = self._connection.execute(
            "SELECT json_extract(CAST(result AS TEXT), '$.response.body.usage') FROM lines "
            "WHERE batch_id = ? AND failed = 0",
            (batch_id,),
        )
        return total_usage(orjson.loads(row[0]) for row in rows if row[0])

    def _start(self, batch_id: str, lines: list[Line], model: str) -> None:
        with self._transaction():
            if self._move(batch_id, ("validating",), "in_progress", {"model": model}):
                self._connection.executemany(
                    "INSERT INTO lines (batch_id, number, custom_id, body) VALUES (?, ?, ?, ?)",
                    [(batch_id, line.number, line.custom_id, line.body) for line in lines],
                )

    def _move(
        self, batch_id: str, source: tuple[str, ...], status: str, more: dict[str, Any]
    ) -> bool:
        changes = {"status": status, f"{status}_at": int(time.time()), **more}
        marks = ", ".join("?" for _ in source)
        # Null is no change in a merge patch, which is what a new batch has anyway.
        return (
            self._connection.execute(
                "UPDATE batches SET body = json_patch(body, ?) "
                f"WHERE id = ? AND status IN ({marks})",
                (_text(changes), batch_id, *source),
            ).rowcount
            > 0
        )

    def _end(self, batch_id: str, source: str, status: str, more: dict[str, Any]) -> bool:
        with self._transaction():
            told = {**more, **self._counts(batch_id), "usage": self._usage(batch_id)}
            ended = self._move(batch_id, (source,), status, told)
            if ended:
                self._connection.execute("DELETE FROM lines WHERE batch_id = ?", (batch_id,))
        return ended

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


def _text(value: object) -> str:
    return orjson.dumps(value).decode()
