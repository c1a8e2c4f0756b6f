"""Stored responses: one SQLite row each, until they are deleted or 30 days old."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import orjson

from serving.database import DatabaseError, open_database
from serving.protocol.errors import ApiError
from serving.protocol.tenancy import NO_TENANT

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_SCHEMA_VERSION = 2
# OpenAI keeps responses as long.
_KEPT_SECONDS = 30 * 24 * 3600
_INDEX_OUTPUT = """
    INSERT OR IGNORE INTO output_items
    SELECT json_extract(value, '$.id'), new.id FROM json_each(new.body, '$.output')
"""
# What a column says stands in the response itself: the two cannot differ.
_CREATE = (
    """
    CREATE TABLE responses (
        id TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        tenant TEXT NOT NULL DEFAULT '-',
        body TEXT NOT NULL,
        input TEXT NOT NULL,
        status TEXT GENERATED ALWAYS AS (json_extract(body, '$.status')),
        created_at REAL GENERATED ALWAYS AS (json_extract(body, '$.created_at')),
        previous_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.previous_response_id'))
    )
    """,
    # In which response an output item is, for those who refer to it by its id.
    """
    CREATE TABLE output_items (
        id TEXT PRIMARY KEY,
        response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE
    ) WITHOUT ROWID
    """,
    "CREATE INDEX output_items_response_id ON output_items (response_id)",
    f"CREATE TRIGGER responses_added AFTER INSERT ON responses BEGIN {_INDEX_OUTPUT}; END",
    f"CREATE TRIGGER responses_ended AFTER UPDATE ON responses BEGIN {_INDEX_OUTPUT}; END",
    "CREATE INDEX responses_created_at ON responses (created_at)",
    "CREATE INDEX responses_unfinished ON responses (owner) WHERE status = 'in_progress'",
)
_UPGRADES = {1: ("ALTER TABLE responses ADD COLUMN tenant TEXT NOT NULL DEFAULT '-'",)}
_CHAIN = """
    WITH RECURSIVE chain (depth, body, input, previous_id, tenant) AS (
        SELECT 0, body, input, previous_id, tenant FROM responses WHERE id = ? AND tenant = ?
        UNION ALL
        SELECT depth + 1, earlier.body, earlier.input, earlier.previous_id, earlier.tenant
        FROM chain JOIN responses AS earlier
            ON earlier.id = chain.previous_id AND earlier.tenant = chain.tenant
    )
    SELECT body, input FROM chain ORDER BY depth DESC
"""
_ITEM = """
    SELECT item.value FROM output_items
    JOIN responses ON responses.id = output_items.response_id
    JOIN json_each(responses.body, '$.output') AS item
    WHERE output_items.id = ? AND responses.tenant = ?
        AND json_extract(item.value, '$.id') = output_items.id
"""
_ABANDONED = json.dumps(
    {
        "code": "server_error",
        "message": "The server was stopped while it worked on this response.",
    }
)


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response (OpenAI's object) and the input items that came with its request."""

    body: dict[str, Any]
    input: list[dict[str, Any]]


class ResponseStore:
    """Keeps responses in a database that other processes may use too.

    A killed process loses nothing that was stored, a power cut what the system had not written to disk
    yet. All methods that wait raise :class:`ApiError` (503) while the database cannot be used.

    A response is its tenant's: others do not find it. Without API keys everything is ``NO_TENANT``'s.

    A response in progress belongs to the process that stored it, which holds a lock as long as it lives:
    once it is gone, whoever asks for the response finds it failed.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the database; raises ``DatabaseError``."""
        self._path = path
        self._connection = open_database(
            path, version=_SCHEMA_VERSION, create=_CREATE, upgrades=_UPGRADES
        )
        # What is deleted is overwritten, not just forgotten.
        self._connection.execute("PRAGMA secure_delete=ON")
        self._connection.execute("PRAGMA foreign_keys=ON")
        self._owner = uuid.uuid4().hex
        self._alive = self._lock_of(self._owner)
        try:
            self._alive.acquire()
        except OSError as error:
            self._connection.close()
            raise DatabaseError(
                f"cannot write in {path.parent}: {error.strerror}; see storage.data_dir"
            ) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")
        # Whom this leaves out is buried when somebody asks for what it worked on.
        with contextlib.suppress(sqlite3.Error, OSError):
            for lock in path.parent.glob(f"{path.name}.*.lock"):
                self._bury(lock.suffixes[-2].removeprefix("."))

    def close(self) -> None:
        """Finish what was begun, and close."""
        self._thread.shutdown()
        self._connection.close()
        self._lock_path(self._owner).unlink(missing_ok=True)
        self._alive.release()

    async def add(self, response: StoredResponse, tenant: str = NO_TENANT) -> None:
        """Keep a response; returns once it is written."""
        await self._run(lambda: self._add(response, tenant))

    async def settle(self, body: dict[str, Any]) -> bool:
        """Replace a response in progress by what it became; False: it was cancelled or deleted meanwhile."""
        return await self._run(
            lambda: self._changes(
                "UPDATE responses SET body = ? WHERE id = ? AND status = 'in_progress'",
                (_text(body), body["id"]),
            )
        )

    async def get(self, response_id: str, tenant: str = NO_TENANT) -> dict[str, Any] | None:
        """A response; None if there is none of that id."""
        return await self._run(lambda: self._get(response_id, tenant))

    async def chain(self, response_id: str, tenant: str = NO_TENANT) -> list[StoredResponse]:
        """A response and those it continues, the oldest first, as far as they are still there."""
        return await self._run(lambda: self._chain(response_id, tenant))

    async def output_items(
        self, ids: Iterable[str], tenant: str = NO_TENANT
    ) -> dict[str, dict[str, Any]]:
        """The output items with these ids, as far as their responses are there."""
        wanted = set(ids)
        rows = await self._run(
            lambda: [
                row
                for item_id in wanted
                for row in self._connection.execute(_ITEM, (item_id, tenant))
            ]
        )
        items = [orjson.loads(row[0]) for row in rows]
        return {item["id"]: item for item in items}

    async def cancel(self, response_id: str, tenant: str = NO_TENANT) -> None:
        """End a response if it is in progress."""
        await self._run(
            lambda: self._changes(
                "UPDATE responses SET body = json_set(body, '$.status', 'cancelled') "
                "WHERE id = ? AND tenant = ? AND status = 'in_progress'",
                (response_id, tenant),
            )
        )

    async def delete(self, response_id: str, tenant: str = NO_TENANT) -> bool:
        """Forget a response; False if there is none of that id."""
        return await self._run(
            lambda: self._changes(
                "DELETE FROM responses WHERE id = ? AND tenant = ?", (response_id, tenant)
            )
        )

    async def in_progress(self) -> set[str]:
        """The ids of the responses that this process should be working on."""
        query = "SELECT id FROM responses WHERE owner = ? AND status = 'in_progress'"
        rows = await self._run(lambda: self._connection.execute(query, (self._owner,)).fetchall())
        return {row[0] for row in rows}

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            _log.error("cannot use the stored responses in %s: %s", self._path, error)
            raise ApiError(
                503,
                "Stored responses cannot be read or written now; the server's log says why. "
                "Requests with 'store' set to false do not need them.",
                code="storage_unavailable",
            ) from error

    def _add(self, response: StoredResponse, tenant: str) -> None:
        self._changes("DELETE FROM responses WHERE created_at < ?", (time.time() - _KEPT_SECONDS,))
        self._connection.execute(
            "INSERT INTO responses (id, owner, tenant, body, input) VALUES (?, ?, ?, ?, ?)",
            (response.body["id"], self._owner, tenant, _text(response.body), _text(response.input)),
        )

    def _get(self, response_id: str, tenant: str) -> dict[str, Any] | None:
        query = "SELECT owner, body, status FROM responses WHERE id = ? AND tenant = ?"
        row = self._connection.execute(query, (response_id, tenant)).fetchone()
        if row is not None and row[2] == "in_progress" and self._bury(row[0]):
            row = self._connection.execute(query, (response_id, tenant)).fetchone()
        return None if row is None else orjson.loads(row[1])

    def _chain(self, response_id: str, tenant: str) -> list[StoredResponse]:
        if self._get(response_id, tenant) is None:
            return []
        rows = self._connection.execute(_CHAIN, (response_id, tenant)).fetchall()
        return [StoredResponse(orjson.loads(body), orjson.loads(items)) for body, items in rows]

    def _bury(self, owner: str) -> bool:
        """Mark what a process was working on as failed if the process is gone; tells whether it is."""
        if owner == self._owner:
            return False
        lock = self._lock_of(owner)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            return False
        try:
            self._changes(
                "UPDATE responses SET body = "
                "json_set(body, '$.status', 'failed', '$.error', json(?)) "
                "WHERE owner = ? AND status = 'in_progress'",
                (_ABANDONED, owner),
            )
        finally:
            # Whoever waits for the lock sees that its file is gone, and makes a new one.
            self._lock_path(owner).unlink(missing_ok=True)
            lock.release()
        return True

    def _changes(self, statement: str, values: tuple[object, ...]) -> bool:
        """Execute a statement; tells whether it changed anything."""
        return self._connection.execute(statement, values).rowcount > 0

    def _lock_path(self, owner: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{owner}.lock")

    def _lock_of(self, owner: str) -> filelock.BaseFileLock:
        return filelock.FileLock(self._lock_path(owner), mode=0o600, thread_local=False)


def _text(value: object) -> str:
    return orjson.dumps(value).decode()
