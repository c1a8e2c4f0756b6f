"""Opening a SQLite database that other processes may be opening, too."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from serving.folders import make_private

_BUSY_SECONDS = 5.0


class DatabaseError(Exception):
    """A database cannot be opened; the message says where it is and what to do."""


def open_database(
    path: Path,
    *,
    version: int,
    create: Iterable[str],
    upgrades: Mapping[int, Iterable[str]] = MappingProxyType({}),
) -> sqlite3.Connection:
    """The database at ``path``, in WAL mode; a new one is made with the statements of ``create``.

    One of an earlier version becomes the next by the statements that ``upgrades`` has for it.

    Only its owner can read its file. The connection may be used by any thread, one at a time. Raises
    :class:`DatabaseError`, also when a later ``version`` of rigserve has written it.
    """
    try:
        make_private(path.parent)
        # Never open one that is there: to close it would drop the locks that other connections of this
        # process have on it, and whoever closes the database next would take their log away.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        connection = sqlite3.connect(
            path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(connection, path, version, create, upgrades)
        except BaseException:
            connection.close()
            raise
    except OSError as error:
        raise DatabaseError(
            f"cannot open {path}: {error.strerror}; see storage.data_dir"
        ) from error
    except sqlite3.Error as error:
        raise DatabaseError(
            f"{path} cannot be used: {error}; "
            "check the disk and its permissions, or move the file away to begin anew"
        ) from error
    return connection


def _prepare(
    connection: sqlite3.Connection,
    path: Path,
    version: int,
    create: Iterable[str],
    upgrades: Mapping[int, Iterable[str]],
) -> None:
    _switch_to_wal(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    # Two processes may open a new database at once: look and create under one lock.
    connection.execute("BEGIN IMMEDIATE")
    found = check_version(connection, path, version)
    statements = [upgrades[each] for each in range(found, version)] if found else [create]
    for statement in chain.from_iterable(statements):
        connection.execute(statement)
    if found != version:
        connection.execute(f"PRAGMA user_version={version}")
    connection.execute("COMMIT")


def check_version(connection: sqlite3.Connection, path: Path, version: int) -> int:
    """The format of a database, 0 if it is new; raises :class:`DatabaseError` if it is beyond ``version``."""
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found > version:
        raise DatabaseError(
            f"{path} was written by a newer rigserve (format {found}); upgrade, or move it away"
        )
    return found


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # While another process makes the same switch, SQLite fails at once instead of waiting.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
