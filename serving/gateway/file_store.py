"""Uploaded and generated files: a SQLite row each, and the content beside the database."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from serving.database import open_database
from serving.folders import make_private
from serving.protocol.errors import ApiError
from serving.protocol.tenancy import NO_TENANT

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_SCHEMA_VERSION = 2
_CREATE = (
    """
    CREATE TABLE files (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        filename TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        created_at INTEGER NOT NULL,
        expires_at INTEGER,
        purpose TEXT NOT NULL,
        tenant TEXT NOT NULL DEFAULT '-'
    )
    """,
)
_UPGRADES = {1: ("ALTER TABLE files ADD COLUMN tenant TEXT NOT NULL DEFAULT '-'",)}
_COLUMNS = ("id", "filename", "bytes", "created_at", "expires_at", "purpose")
_SELECT = f"""
    SELECT {", ".join(_COLUMNS)} FROM files
    WHERE (expires_at IS NULL OR expires_at > ?) AND tenant = ?
"""
# Contents without a row belong to a process that is writing them, or was killed while it did.
_ABANDONED_SECONDS = 3600


class FileStore:
    """Keeps files in a folder that other processes may use too.

    A file is its tenant's: others do not find it. Without API keys everything is ``NO_TENANT``'s.
    A file is there as a whole or not at all. All methods that wait raise :class:`ApiError`: 507 when
    the disk is full, 503 while the store cannot be used otherwise.
    """

    def __init__(self, data_dir: Path) -> None:
        """Open or create the store; raises ``DatabaseError``."""
        self._connection = open_database(
            data_dir / "files.sqlite",
            version=_SCHEMA_VERSION,
            create=_CREATE,
            upgrades=_UPGRADES,
        )
        self._connection.execute("PRAGMA secure_delete=ON")
        self._folder = data_dir / "files"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")

    def close(self) -> None:
        """Finish what was begun, and close."""
        self._thread.shutdown()
        self._connection.close()

    async def add(
        self,
        file_id: str,
        write: Callable[[BinaryIO], object],
        *,
        filename: str,
        purpose: str,
        keep_seconds: int | None,
        tenant: str = NO_TENANT,
    ) -> dict[str, Any]:
        """Keep what ``write`` writes, in place of an older file of that id; gives OpenAI's file object."""
        return await self._run(
            lambda: self._add(file_id, write, filename, purpose, keep_seconds, tenant)
        )

    async def get(self, file_id: str, tenant: str = NO_TENANT) -> dict[str, Any] | None:
        """A file's object; None if there is none of that id."""
        return await self._run(lambda: self._get(file_id, tenant))

    async def page(
        self,
        *,
        after: str | None,
        limit: int,
        order: str,
        purpose: str | None,
        tenant: str = NO_TENANT,
    ) -> list[dict[str, Any]]:
        """Up to ``limit`` files, from the one behind ``after`` on; raises :class:`ApiError` if that is gone."""
        return await self._run(lambda: self._list(after, limit, order, purpose, tenant))

    async def open(self, file_id: str, tenant: str = NO_TENANT) -> BinaryIO | None:
        """A file's content, which stays readable when the file is deleted; None if there is none."""
        return await self._run(lambda: self._open(file_id, tenant))

    async def delete(self, file_id: str, tenant: str = NO_TENANT) -> bool:
        """Delete a file; False if there is none of that id."""
        return await self._run(lambda: self._delete(file_id, tenant))

    async def sweep(self) -> None:
        """Delete what has expired, and what killed processes left half done."""
        await self._run(self._sweep)

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            _log.error("cannot use the files in %s: %s", self._folder, error)
            raise storage_error(error) from error

    def _add(
        self,
        file_id: str,
        write: Callable[[BinaryIO], object],
        filename: str,
        purpose: str,
        keep_seconds: int | None,
        tenant: str,
    ) -> dict[str, Any]:
        make_private(self._folder)
        path = self._folder / file_id
        part = path.with_suffix(".part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                size_bytes = file.tell()
            part.replace(path)
            now_unix = int(time.time())
            expires_at = None if keep_seconds is None else now_unix + keep_seconds
            self._connection.execute(
                "INSERT OR REPLACE INTO files "
                "(id, filename, bytes, created_at, expires_at, purpose, tenant) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (file_id, filename, size_bytes, now_unix, expires_at, purpose, tenant),
            )
        except BaseException:
            part.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise
        return _file_object((file_id, filename, size_bytes, now_unix, expires_at, purpose))

    def _get(self, file_id: str, tenant: str) -> dict[str, Any] | None:
        row = self._connection.execute(
            f"{_SELECT} AND id = ?", (time.time(), tenant, file_id)
        ).fetchone()
        return None if row is None else _file_object(row)

    def _list(
        self, after: str | None, limit: int, order: str, purpose: str | None, tenant: str
    ) -> list[dict[str, Any]]:
        start = None
        if after is not None:
            row = self._connection.execute(
                "SELECT number FROM files WHERE id = ? AND tenant = ?", (after, tenant)
            ).fetchone()
            if row is None:
                raise ApiError(
                    400, f"No file has the id '{after}'.", param="after", code="invalid_value"
                )
            start = row[0]
        sign, direction = ("<", "DESC") if order == "desc" else (">", "ASC")
        rows = self._connection.execute(
            f"{_SELECT} AND (? IS NULL OR purpose = ?) AND (? IS NULL OR number {sign} ?) "
            f"ORDER BY number {direction} LIMIT ?",
            (time.time(), tenant, purpose, purpose, start, start, limit),
        )
        return list(map(_file_object, rows))

    def _open(self, file_id: str, tenant: str) -> BinaryIO | None:
        if self._get(file_id, tenant) is None:
            return None
        try:
            return (self._folder / file_id).open("rb")
        except FileNotFoundError:
            return None

    def _delete(self, file_id: str, tenant: str) -> bool:
        known = self._connection.execute(
            "SELECT 1 FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)
        ).fetchone()
        if known is None:
            return False
        # First: on a full disk this is what makes room for the row's change.
        (self._folder / file_id).unlink(missing_ok=True)
        self._connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        return True

    def _sweep(self) -> None:
        now_unix = time.time()
        expired = self._connection.execute(
            "SELECT id, tenant FROM files WHERE expires_at <= ?", (now_unix,)
        ).fetchall()
        for file_id, tenant in expired:
            self._delete(file_id, tenant)
        if not self._folder.exists():
            return
        known = {row[0] for row in self._connection.execute("SELECT id FROM files")}
        for path in self._folder.iterdir():
            age_seconds = now_unix - path.stat().st_mtime
            if path.name not in known and age_seconds > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)


def copying(source: BinaryIO) -> Callable[[BinaryIO], object]:
    """Writes the rest of ``source``."""
    return lambda target: shutil.copyfileobj(source, target, 1024 * 1024)


def storage_error(error: Exception) -> ApiError:
    """What a client is told of a disk or a database that fails."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return ApiError(507, "The server's disk is full.", code="storage_full")
    return ApiError(
        503,
        "Files and batches cannot be read or written now; the server's log says why.",
        code="storage_unavailable",
    )


def _file_object(row: tuple[Any, ...]) -> dict[str, Any]:
    return {
        "object": "file",
        **dict(zip(_COLUMNS, row, strict=True)),
        "status": "processed",
        "status_details": None,
    }
