"""The keys in memory, where each request looks its own up."""

from __future__ import annotations

import hmac
import logging
import sqlite3
import threading
import time
from pathlib import Path

from serving.keys.key import Key, hash_of
from serving.keys.store import all_keys, open_keys

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_WRITE_SECONDS = 10.0
_COMPLAINT_SECONDS = 60.0


class KeyRing:
    """All keys of a data folder. What other connections and processes change is here within about a second.

    While the database cannot be read, what was known last holds. Methods may be called by any thread and,
    :meth:`refresh` and :meth:`close` aside, do not block.
    """

    def __init__(self, data_dir: Path) -> None:
        """Read the keys; raises ``DatabaseError``."""
        self._connection = open_keys(data_dir)
        self._lock = threading.Lock()
        self._by_id: dict[str, Key] = {}
        self._by_hash: dict[bytes, tuple[bytes, str, float | None]] = {}
        self._used_at: dict[str, float] = {}
        self._version: int | None = None
        self._last_complaint = float("-inf")
        self.refresh()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="keys", daemon=True)
        self._watcher.start()

    @property
    def in_use(self) -> bool:
        """Whether there ever was a key: revoking the last one does not open the gateway again."""
        return bool(self._by_id)

    @property
    def keys(self) -> list[Key]:
        """All keys, those revoked included."""
        return list(self._by_id.values())

    def find(self, secret: str) -> Key | None:
        """The key that has this secret and is good now.

        How long it takes tells nothing of the secrets: they are looked up by hashes, which whoever
        guesses cannot steer.
        """
        digest = hash_of(secret)
        known = self._by_hash.get(digest)
        if known is None or not hmac.compare_digest(known[0], digest):
            return None
        _, key_id, expires_at = known
        now = time.time()
        if expires_at is not None and now >= expires_at:
            return None
        key = self.active(key_id)
        if key is not None:
            self._used_at[key_id] = now
        return key

    def active(self, key_id: str) -> Key | None:
        """A key by its id; None if it is revoked, expired, or unknown."""
        key = self._by_id.get(key_id)
        return key if key is not None and key.state(time.time()) == "active" else None

    def refresh(self) -> None:
        """Read what has changed; returns once it holds."""
        with self._lock:
            version = int(self._connection.execute("PRAGMA data_version").fetchone()[0])
            if version == self._version:
                return
            self._connection.execute("BEGIN")
            try:
                keys = all_keys(self._connection)
                rows = self._connection.execute("SELECT hash, key_id, expires_at FROM secrets")
                secrets = {row[0]: row for row in rows}
            finally:
                self._connection.execute("COMMIT")
            self._by_id = {key.id: key for key in keys}
            self._by_hash = secrets
            self._version = version

    def close(self) -> None:
        """Write down when keys were used last, and close."""
        self._closing.set()
        self._watcher.join()
        self._connection.close()

    def _watch(self) -> None:
        written_at = time.monotonic()
        is_closing = False
        while not is_closing:
            is_closing = self._closing.wait(_LOOK_SECONDS)
            try:
                self.refresh()
                if is_closing or time.monotonic() - written_at > _WRITE_SECONDS:
                    written_at = time.monotonic()
                    self._write_last_uses()
            except sqlite3.Error as error:
                self._complain(error)

    def _write_last_uses(self) -> None:
        used_at, self._used_at = self._used_at, {}
        if not used_at:
            return
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(
                    "UPDATE keys SET last_used_at = max(coalesce(last_used_at, 0), ?) WHERE id = ?",
                    [(moment, key_id) for key_id, moment in list(used_at.items())],
                )
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _complain(self, error: sqlite3.Error) -> None:
        if time.monotonic() - self._last_complaint > _COMPLAINT_SECONDS:
            self._last_complaint = time.monotonic()
            _log.error("cannot use the API keys (%s); those known before hold", error)
