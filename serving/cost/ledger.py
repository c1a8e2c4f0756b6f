"""The usage ledger: one SQLite row a request, written in batches off the hot path."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from serving.cost.traffic import Traffic
from serving.database import DatabaseError, check_version, open_database

_log = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_COMMIT_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 10.0
_COMPLAINT_SECONDS = 60.0
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "bool": "INTEGER", "float": "REAL"}


class LedgerError(Exception):
    """The ledger cannot be opened, read or written; the message says where it is and what to do."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request, as it is written down: each field is a column of the table ``usage``.

    ``started_at`` is Unix time. ``request_id`` may repeat: clients can choose it. The sources tell who
    measured: ``engine``, ``nvml``, ``rapl``, or ``estimated``.
    """

    started_at: float
    request_id: str
    user: str
    model: str
    engine: str
    endpoint: str
    status: int
    streamed: bool
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    tokens_source: str
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prefill_busy_seconds: float
    decode_busy_seconds: float
    timing_source: str
    energy_joules: float
    energy_source: str
    energy_usd: float
    idle_usd: float
    hardware_usd: float


_COLUMNS = [field.name for field in fields(UsageRecord)]
_CREATE = (
    "CREATE TABLE usage (id INTEGER PRIMARY KEY, {})".format(
        ", ".join(
            f"{field.name} {_SQL_TYPES[str(field.type)]} NOT NULL" for field in fields(UsageRecord)
        )
    ),
    "CREATE INDEX usage_started_at ON usage (started_at)",
)
_INSERT = "INSERT INTO usage ({}) VALUES ({})".format(
    ", ".join(_COLUMNS), ", ".join("?" for _ in _COLUMNS)
)


class Ledger:
    """Appends records to a database that other processes may use too.

    While the database cannot be written (disk full, locked) records wait in memory and are tried again:
    none is dropped while the process lives. A killed process loses at most the last half second, a power
    cut what the system had not written to disk yet; neither damages the database.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the database; raises :class:`LedgerError`."""
        self._path = path
        try:
            # Opened here for its errors, used by the writer's thread alone.
            self._connection = open_database(path, version=_SCHEMA_VERSION, create=_CREATE)
        except DatabaseError as error:
            raise LedgerError(f"the ledger: {error}") from error
        self._records: queue.SimpleQueue[UsageRecord] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unwritten: list[UsageRecord] = []
        self._closing = threading.Event()
        self._last_complaint = float("-inf")
        self._writer = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._writer.start()

    def append(self, record: UsageRecord) -> None:
        """Take a record; it is committed within half a second. Never blocks, never raises."""
        self._records.put(record)

    def flush(self) -> None:
        """Commit everything appended so far; raises :class:`LedgerError` if that cannot be done now."""
        with _readable_errors(self._path):
            self._commit()

    def close(self) -> None:
        """Commit and close; raises :class:`LedgerError` when records had to be left unwritten."""
        self._closing.set()
        self._writer.join()
        try:
            self.flush()
        except LedgerError:
            _log.error("%d usage records could not be written and are lost", len(self._unwritten))
            raise
        finally:
            self._connection.close()

    def _run(self) -> None:
        wait_seconds = _COMMIT_SECONDS
        while not self._closing.wait(wait_seconds):
            try:
                self._commit()
                wait_seconds = _COMMIT_SECONDS
            except sqlite3.Error as error:
                wait_seconds = min(2 * wait_seconds, _LONGEST_RETRY_SECONDS)
                self._complain(error)

    def _commit(self) -> None:
        with self._lock:
            while not self._records.empty():
                self._unwritten.append(self._records.get())
            if not self._unwritten:
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for record in self._unwritten:
                    self._insert(record)
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._unwritten.clear()

    def _insert(self, record: UsageRecord) -> None:
        try:
            self._connection.execute(_INSERT, astuple(record))
        except (sqlite3.IntegrityError, OverflowError, UnicodeEncodeError) as error:
            # Tried again it would fail again, and keep all that come after it from the ledger.
            _log.error("a usage record cannot be stored (%s): %r", error, record)

    def _complain(self, error: sqlite3.Error) -> None:
        if time.monotonic() - self._last_complaint > _COMPLAINT_SECONDS:
            self._last_complaint = time.monotonic()
            _log.error(
                "cannot write the ledger %s (%s); %d records wait in memory",
                *(self._path, error, len(self._unwritten)),
            )


def read_traffic(path: Path, *, since: float | None = None, model: str | None = None) -> Traffic:
    """Sum the requests of a ledger, from Unix time ``since`` on, of one model or of all.

    Requests that failed count with what they used. Never writes. Raises :class:`LedgerError` when there are none.
    """
    if not path.exists():
        raise LedgerError(f"there is no ledger at {path}; serve some requests first")
    query = """
        SELECT count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens),
               sum(prefill_busy_seconds), sum(decode_busy_seconds), sum(energy_joules),
               group_concat(DISTINCT energy_source), group_concat(DISTINCT timing_source)
        FROM usage WHERE started_at >= ? AND (? IS NULL OR model = ?)
    """
    uri = f"{path.resolve().as_uri()}?mode=ro"
    with _readable_errors(path), closing(sqlite3.connect(uri, uri=True)) as connection:
        check_version(connection, path, _SCHEMA_VERSION)
        row = connection.execute(query, (since or 0.0, model, model)).fetchone()
    if not row[0]:
        raise LedgerError(f"the ledger {path} has no such requests")
    *sums, energy_sources, timing_sources = row
    return Traffic(*[*sums, _joined(energy_sources), _joined(timing_sources)])


def _joined(sources: str) -> str:
    return "mixed" if "," in sources else sources


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        raise LedgerError(f"the ledger: {error}") from error
    except sqlite3.Error as error:
        raise LedgerError(
            f"the ledger {path} cannot be used: {error}; "
            "check the disk and its permissions, or move the file away to begin anew"
        ) from error
