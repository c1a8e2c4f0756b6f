"""The API keys of a data folder, in SQLite. What is changed here reaches running servers by themselves."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import orjson

from serving.database import open_database
from serving.keys.key import Allowance, Key, hash_of, new_secret
from serving.protocol.errors import ApiError
from serving.protocol.keys import NewKey
from serving.protocol.responses import new_id

_SCHEMA_VERSION = 1
_CREATE = (
    "CREATE TABLE tenants (name TEXT PRIMARY KEY, weight REAL NOT NULL, priority TEXT NOT NULL)",
    """
    CREATE TABLE keys (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        tenant TEXT NOT NULL REFERENCES tenants (name),
        models TEXT,
        requests_per_minute INTEGER,
        tokens_per_minute INTEGER,
        max_concurrent INTEGER,
        budget_usd REAL,
        budget_tokens INTEGER,
        budget_period TEXT NOT NULL,
        is_admin INTEGER NOT NULL,
        created_at REAL NOT NULL,
        expires_at REAL,
        revoked_at REAL,
        last_used_at REAL
    )
    """,
    "CREATE UNIQUE INDEX keys_name ON keys (name) WHERE revoked_at IS NULL",
    # A key that was rotated has two for a while. `hash` is the SHA-256 of what clients send.
    """
    CREATE TABLE secrets (
        hash BLOB PRIMARY KEY,
        key_id TEXT NOT NULL REFERENCES keys (id),
        expires_at REAL
    ) WITHOUT ROWID
    """,
    "CREATE INDEX secrets_key_id ON secrets (key_id)",
)
_LIMITS = [field.name for field in fields(Allowance)]
_SELECT = f"""
    SELECT id, keys.name, tenant, weight, priority, models, {", ".join(_LIMITS)},
           is_admin, created_at, expires_at, revoked_at, last_used_at
    FROM keys JOIN tenants ON tenants.name = keys.tenant
"""
_INSERT = f"""
    INSERT INTO keys (id, name, tenant, models, is_admin, created_at, expires_at, {", ".join(_LIMITS)})
    VALUES (?, ?, ?, ?, ?, ?, ?, {", ".join("?" for _ in _LIMITS)})
"""


def keys_path(data_dir: Path) -> Path:
    """Where the keys of a data folder are."""
    return data_dir / "keys.sqlite"


def open_keys(data_dir: Path) -> sqlite3.Connection:
    """A connection to the keys, which are created if need be; raises ``DatabaseError``."""
    return open_database(keys_path(data_dir), version=_SCHEMA_VERSION, create=_CREATE)


def all_keys(connection: sqlite3.Connection) -> list[Key]:
    """All keys, those revoked included, the oldest first."""
    return [_key(row) for row in connection.execute(f"{_SELECT} ORDER BY number")]


class KeyStore:
    """Makes, lists and ends keys. Methods block, may be called by any thread, and raise :class:`ApiError`."""

    def __init__(self, data_dir: Path) -> None:
        """Open or create the database; raises ``DatabaseError``."""
        self._connection = open_keys(data_dir)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def create(self, asked: NewKey) -> tuple[Key, str]:
        """A new key and its secret, which is not to be had again. 409 if the name is taken."""
        secret, key_id, now = new_secret(), new_id("key"), time.time()
        tenant = asked.tenant or asked.name
        allowance = Allowance(
            **{name: getattr(asked, name) for name in _LIMITS if name != "budget_period"},
            budget_period=asked.budget_period or "month",
        )
        expires_at = None if asked.expires_in_seconds is None else now + asked.expires_in_seconds
        models = None if asked.models is None else orjson.dumps(asked.models).decode()
        row = (key_id, asked.name, tenant, models, asked.is_admin, now, expires_at)
        with self._transaction() as connection:
            if connection.execute(
                "SELECT 1 FROM keys WHERE name = ? AND revoked_at IS NULL", (asked.name,)
            ).fetchone():
                raise ApiError(
                    409,
                    f"There is a key named '{asked.name}' already; rotate or revoke it, "
                    "or choose another name.",
                    param="name",
                    code="name_taken",
                )
            connection.execute(
                "INSERT INTO tenants VALUES (?, coalesce(?, 1.0), coalesce(?, 'interactive')) "
                "ON CONFLICT DO UPDATE SET weight = coalesce(?, weight), "
                "priority = coalesce(?, priority)",
                (tenant, asked.weight, asked.priority, asked.weight, asked.priority),
            )
            connection.execute(_INSERT, (*row, *astuple(allowance)))
            _add_secret(connection, key_id, secret)
            return _found(connection, key_id), secret

    def all(self) -> list[Key]:
        """All keys, those revoked included, the oldest first."""
        with self._transaction() as connection:
            return all_keys(connection)

    def get(self, name: str) -> Key:
        """A key by its id, or by its name: then the one that is not revoked, or else the last. 404 if none."""
        with self._transaction() as connection:
            return _found(connection, name)

    def revoke(self, name: str) -> Key:
        """End a key for good, with all its secrets; nothing happens to one that is revoked. 404 if none."""
        with self._transaction() as connection:
            key = _found(connection, name)
            connection.execute("DELETE FROM secrets WHERE key_id = ?", (key.id,))
            connection.execute(
                "UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?",
                (time.time(), key.id),
            )
            return _found(connection, key.id)

    def rotate(self, name: str, grace_seconds: float) -> tuple[Key, str]:
        """A new secret for a key; those it had are good for ``grace_seconds`` more. 404 if none, 409 if revoked."""
        secret = new_secret()
        with self._transaction() as connection:
            key = _found(connection, name)
            if key.revoked_at is not None:
                raise ApiError(
                    409, f"The key '{key.name}' is revoked; make a new one.", code="key_revoked"
                )
            now = time.time()
            connection.execute(
                "DELETE FROM secrets WHERE key_id = ? AND (expires_at <= ? OR ? = 0)",
                (key.id, now, grace_seconds),
            )
            connection.execute(
                "UPDATE secrets SET expires_at = min(coalesce(expires_at, ?), ?) WHERE key_id = ?",
                (now + grace_seconds, now + grace_seconds, key.id),
            )
            _add_secret(connection, key.id, secret)
            return key, secret

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            raise ApiError(
                503, f"The keys cannot be read or written now: {error}.", code="storage_unavailable"
            ) from error


def _add_secret(connection: sqlite3.Connection, key_id: str, secret: str) -> None:
    connection.execute(
        "INSERT INTO secrets (hash, key_id) VALUES (?, ?)", (hash_of(secret), key_id)
    )


def _found(connection: sqlite3.Connection, name: str) -> Key:
    row = connection.execute(
        f"{_SELECT} WHERE id = ? OR keys.name = ? "
        "ORDER BY id = ? DESC, revoked_at IS NULL DESC, number DESC LIMIT 1",
        (name, name, name),
    ).fetchone()
    if row is None:
        raise ApiError(404, f"There is no key '{name[:200]}'.", code="not_found")
    return _key(row)


def _key(row: tuple[Any, ...]) -> Key:
    key_id, name, tenant, weight, priority, models, *rest = row
    limits, (is_admin, *moments) = rest[: len(_LIMITS)], rest[len(_LIMITS) :]
    return Key(
        key_id,
        name,
        tenant,
        weight,
        priority,
        None if models is None else tuple(orjson.loads(models)),
        Allowance(*limits),
        bool(is_admin),
        *moments,
    )
