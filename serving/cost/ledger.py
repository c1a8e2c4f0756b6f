"""The usage ledger: one SQLite row a request, written in batches off the hot path."""

from __future__ import annotations

import itertools
import logging
import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, fields, replace
from itertools import chain
from pathlib import Path

from serving.cost import rollup
from serving.cost.rollup import Dimension, Selection, UsageSum
from serving.cost.spool import Row, Spool
from serving.cost.traffic import Cuts, Traffic
from serving.database import DatabaseError, check_version, open_database

_log = logging.getLogger(__name__)

_SCHEMA_VERSION = 5
_COMMIT_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 10.0
_COMPLAINT_SECONDS = 60.0
_OWN, _NO_CUTS = Selection(own_engines_only=True), Cuts()
_TOKENS = "prompt_tokens + completion_tokens"
_USD = "energy_usd + idle_usd + hardware_usd + api_usd"
# No row has a higher number.
_LAST = 2**63 - 1
_SQL_TYPES = {"str": "TEXT", "int": "INTEGER", "bool": "INTEGER", "float": "REAL"}


class LedgerError(Exception):
    """The ledger cannot be opened, read or written; the message says where it is and what to do."""


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request, as it is written down: each field is a column of the table ``usage``.

    ``started_at`` is Unix time. ``request_id`` may repeat: clients can choose it. The sources tell who
    measured: ``engine``; ``nvml``, ``rapl`` or a meter at the wall; or ``estimated``; ``none`` where there was no energy of the rig's.
    ``idle_joules`` of the energy would have been drawn without the request, too. ``model`` is the LoRA adapter
    if the request has one, and then ``base_model`` what it changes; otherwise that is ``-``. ``service_tier``
    is ``batch`` for lines of batches, ``flex`` for what else gives way to other requests, or ``default``.
    ``key_id`` and ``tenant`` are ``-`` for requests without an API key. ``route`` is the name that was asked
    for, if that is a route's, and ``served_as`` says as what the model served it: ``target``, ``fallback``
    or ``spill_over``. ``api_usd`` is the price of another server's answer.
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
    key_id: str = "-"
    tenant: str = "-"
    api_usd: float = 0.0
    route: str = "-"
    served_as: str = "-"
    base_model: str = "-"
    service_tier: str = "default"
    idle_joules: float = 0.0

    @property
    def usd(self) -> float:
        """What the request cost in all."""
        return self.energy_usd + self.idle_usd + self.hardware_usd + self.api_usd


_COLUMNS = [field.name for field in fields(UsageRecord)]
_DEFAULTS = [field.default for field in fields(UsageRecord)]
_CREATE = (
    "CREATE TABLE usage (id INTEGER PRIMARY KEY, {}, uid TEXT)".format(
        ", ".join(
            f"{field.name} {_SQL_TYPES[str(field.type)]} NOT NULL" for field in fields(UsageRecord)
        )
    ),
    "CREATE INDEX usage_started_at ON usage (started_at)",
    "CREATE UNIQUE INDEX usage_uid ON usage (uid)",
    *rollup.CREATE,
)
_UPGRADES = {
    1: (
        "ALTER TABLE usage ADD COLUMN key_id TEXT NOT NULL DEFAULT '-'",
        "ALTER TABLE usage ADD COLUMN tenant TEXT NOT NULL DEFAULT '-'",
    ),
    2: (
        "ALTER TABLE usage ADD COLUMN uid TEXT",
        "CREATE UNIQUE INDEX usage_uid ON usage (uid)",
    ),
    3: (
        "ALTER TABLE usage ADD COLUMN api_usd REAL NOT NULL DEFAULT 0.0",
        "ALTER TABLE usage ADD COLUMN route TEXT NOT NULL DEFAULT '-'",
        "ALTER TABLE usage ADD COLUMN served_as TEXT NOT NULL DEFAULT '-'",
    ),
    4: (
        "ALTER TABLE usage ADD COLUMN base_model TEXT NOT NULL DEFAULT '-'",
        "ALTER TABLE usage ADD COLUMN service_tier TEXT NOT NULL DEFAULT 'default'",
        "ALTER TABLE usage ADD COLUMN idle_joules REAL NOT NULL DEFAULT 0.0",
        *rollup.CREATE,
        *rollup.FILL,
    ),
}
# A row that was spooled may have been written all the same, when the process ended just then.
_INSERT = "INSERT INTO usage ({}, uid) VALUES ({}, ?) ON CONFLICT (uid) DO NOTHING".format(
    ", ".join(_COLUMNS), ", ".join("?" for _ in _COLUMNS)
)


class Ledger:
    """Appends records to a database that other processes may use too.

    While the database cannot be written (disk full, locked, read-only) records wait in a spool beside it,
    or in memory if that cannot be written either, and are tried again: none is dropped while the process
    lives, none is written twice, and what is spooled outlives it. A killed process loses at most the last
    half second, or what could not even be spooled; a power cut what the system had not written to disk
    yet; neither damages the database.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the database; raises :class:`LedgerError`."""
        self._path = path
        try:
            # Opened here for its errors, used by the writer's thread alone.
            self._connection = _open(path)
        except DatabaseError as error:
            raise LedgerError(f"the ledger: {error}") from error
        self._records: queue.SimpleQueue[UsageRecord] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unwritten: list[Row] = []
        self._spool = Spool(path.with_suffix(".spool"))
        # Of this process's rows.
        self.uid_prefix, self._uid_numbers = secrets.token_hex(8), itertools.count()
        self._closing = threading.Event()
        self._last_complaint = float("-inf")
        # Whether the last commit failed.
        self.is_failing = False
        # What is spooled counts for limits, which are read from the database.
        self._try_to_commit()
        self._writer = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._writer.start()

    def append(self, record: UsageRecord) -> None:
        """Take a record; it is committed within half a second. Never blocks, never raises."""
        self._records.put(record)

    @property
    def waiting(self) -> int:
        """Records that should be in the database and are not, in memory and spooled."""
        return self._records.qsize() + len(self._unwritten) + self._spool.rows

    def flush(self) -> None:
        """Commit everything appended so far; raises :class:`LedgerError` if that cannot be done now."""
        with _readable_errors(self._path):
            self._commit()

    def close(self) -> None:
        """Commit, or else spool, and close; raises :class:`LedgerError` when records are lost."""
        self._closing.set()
        self._writer.join()
        try:
            self.flush()
        except LedgerError:
            if not self._spooled():
                _log.error(
                    "%d usage records could not be written and are lost", len(self._unwritten)
                )
                raise
            _log.error(
                "%d usage records wait in %s for the next start",
                self._spool.rows,
                self._spool.folder,
            )
        finally:
            self._connection.close()

    def _run(self) -> None:
        wait_seconds = _COMMIT_SECONDS
        while not self._closing.wait(wait_seconds):
            if self._try_to_commit():
                wait_seconds = _COMMIT_SECONDS
            else:
                wait_seconds = min(2 * wait_seconds, _LONGEST_RETRY_SECONDS)

    def _try_to_commit(self) -> bool:
        """Commit; what cannot be committed is spooled."""
        try:
            self._commit()
        except (sqlite3.Error, OSError) as error:
            self._spooled()
            self._complain(error)
            return False
        if self.is_failing:
            self.is_failing = False
            _log.warning("the ledger %s can be written again; nothing is lost", self._path)
        return True

    def _spooled(self) -> bool:
        """Move what waits in memory to the spool; false if it cannot be written either."""
        with self._lock:
            self._take()
            if not self._spool.add(self._unwritten):
                return False
            self._unwritten.clear()
            return True

    def _take(self) -> None:
        while not self._records.empty():
            uid = f"{self.uid_prefix}-{next(self._uid_numbers)}"
            self._unwritten.append((*astuple(self._records.get()), uid))

    def _commit(self) -> None:
        with self._lock:
            self._take()
            files = self._spool.files()
            if not self._unwritten and not files:
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for row in chain(self._spool.read(files), self._unwritten):
                    self._insert(row)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._unwritten.clear()
            self._spool.remove(files)

    def _insert(self, row: Row) -> None:
        # What an older version has spooled lacks the newest columns, which come last but for the uid.
        *values, uid = row
        row = (*values, *_DEFAULTS[len(values) :], uid)
        try:
            self._connection.execute(_INSERT, row)
        except (
            sqlite3.IntegrityError,
            sqlite3.ProgrammingError,
            OverflowError,
            UnicodeEncodeError,
        ) as error:
            # Tried again it would fail again, and keep all that come after it from the ledger.
            _log.error("a usage record cannot be stored (%s): %r", error, row)

    def _complain(self, error: Exception) -> None:
        self.is_failing = True
        if time.monotonic() - self._last_complaint > _COMPLAINT_SECONDS:
            self._last_complaint = time.monotonic()
            _log.error(
                "cannot write the ledger %s (%s); %d records wait in %s, %d in memory",
                *(self._path, error, self._spool.rows, self._spool.folder, len(self._unwritten)),
            )


def read_usage(
    path: Path, selected: Selection, cuts: Cuts, by: Dimension | None = None
) -> list[UsageSum]:
    """Sums of the usage that is ``selected``, none across a cut. Raises :class:`LedgerError`."""
    _require(path)
    with _reading(path) as connection:
        return rollup.read_sums(connection, selected, cuts, by)


def _require(path: Path) -> None:
    if not path.exists():
        raise LedgerError(f"there is no ledger at {path}; serve some requests first")


def read_traffic(path: Path, selected: Selection = _OWN, cuts: Cuts = _NO_CUTS) -> Traffic:
    """Sum the requests that the rig itself served. Those that failed count with what they used.

    Raises :class:`LedgerError` when there are none.
    """
    _require(path)
    own = replace(selected, own_engines_only=True)
    with _reading(path) as connection:
        sums = rollup.read_sums(connection, own, cuts)
        first, last = connection.execute(
            "SELECT (SELECT min(started_at) FROM usage WHERE started_at >= ?), max(started_at) FROM usage",
            (selected.since,),
        ).fetchone()
    if not sums:
        raise LedgerError(f"the ledger {path} has no such requests")
    tokens = [each.tokens for each in sums]
    return Traffic(
        requests=sum(each.requests for each in tokens),
        prompt_tokens=sum(each.prompt_tokens for each in tokens),
        cached_tokens=sum(each.cached_tokens for each in tokens),
        completion_tokens=sum(each.completion_tokens for each in tokens),
        prefill_busy_seconds=sum(each.prefill_busy_seconds for each in sums),
        decode_busy_seconds=sum(each.decode_busy_seconds for each in sums),
        energy_joules=sum(each.energy_joules for each in sums),
        idle_joules=sum(each.idle_joules for each in sums),
        energy_source=_joined(each.energy_source for each in sums),
        timing_source=_joined(each.timing_source for each in sums),
        elapsed_seconds=last - first,
        tokens_source=_joined(each.tokens_source for each in sums),
        groups=tuple(tokens),
    )


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """What requests of an API key used: one request, begun at Unix time ``started_at``, or all of a period."""

    key_id: str
    started_at: float
    tokens: int
    usd: float


@dataclass(frozen=True, slots=True)
class ForeignUsage:
    """What a request used that another process has served; ``api_usd`` of it is the price of ``model`` elsewhere."""

    of_key: KeyUsage
    model: str
    api_usd: float


def last_row(path: Path) -> int:
    """The number of the row that was written last; 0 if there is none. Raises :class:`LedgerError`."""
    with _reading(path) as connection:
        return int(connection.execute("SELECT coalesce(max(id), 0) FROM usage").fetchone()[0])


def read_requests_of_keys(path: Path, since: float, until_row: int = _LAST) -> list[KeyUsage]:
    """Each request with an API key from Unix time ``since`` on. Raises :class:`LedgerError`."""
    return _usage_of_keys(path, since, until_row, group_by="id")


def read_usage_of_keys(path: Path, since: float, until_row: int = _LAST) -> list[KeyUsage]:
    """What was used with each API key from Unix time ``since`` on. Raises :class:`LedgerError`."""
    return _usage_of_keys(path, since, until_row, group_by="key_id")


def read_spending(path: Path, since: float, until_row: int = _LAST) -> dict[str, float]:
    """What other servers' answers cost from Unix time ``since`` on, in USD by model. Raises :class:`LedgerError`."""
    query = (
        "SELECT model, sum(api_usd) FROM usage "
        "WHERE started_at >= ? AND id <= ? AND api_usd > 0 GROUP BY model"
    )
    with _reading(path) as connection:
        return dict(connection.execute(query, (since, until_row)))


def read_usage_of_others(
    path: Path, after_row: int, uid_prefix: str
) -> tuple[int, list[ForeignUsage]]:
    """What others than the process of this prefix have written after a row, and the last row now.

    Raises :class:`LedgerError`.
    """
    query = f"""
        SELECT id, coalesce(uid, '') LIKE ? || '-%', key_id, started_at, {_TOKENS}, {_USD}, model, api_usd
        FROM usage WHERE id > ? ORDER BY id
    """
    used: list[ForeignUsage] = []
    with _reading(path) as connection:
        for row, is_own, *of_key, model, api_usd in connection.execute(
            query, (uid_prefix, after_row)
        ):
            after_row = row
            if not is_own:
                used.append(ForeignUsage(KeyUsage(*of_key), model, api_usd))
    return after_row, used


def _usage_of_keys(path: Path, since: float, until_row: int, *, group_by: str) -> list[KeyUsage]:
    query = f"""
        SELECT key_id, min(started_at), sum({_TOKENS}), sum({_USD})
        FROM usage WHERE started_at >= ? AND id <= ? AND key_id != '-' GROUP BY {group_by} ORDER BY 2
    """
    with _reading(path) as connection:
        return [KeyUsage(*row) for row in connection.execute(query, (since, until_row))]


def _joined(sources: Iterable[str]) -> str:
    different = set(sources)
    return different.pop() if len(different) == 1 else "mixed"


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one state of the ledger, however many statements read it and whoever writes meanwhile."""
    uri = f"{path.resolve().as_uri()}?mode=ro"
    with _readable_errors(path):
        _taken_on(path)
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("BEGIN")
            yield connection


def _taken_on(path: Path) -> None:
    """Have a ledger in the present format, as a server would when it starts."""
    uri = f"{path.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        if check_version(connection, path, _SCHEMA_VERSION) == _SCHEMA_VERSION:
            return
    _open(path).close()


def _open(path: Path) -> sqlite3.Connection:
    return open_database(path, version=_SCHEMA_VERSION, create=_CREATE, upgrades=_UPGRADES)


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        raise LedgerError(f"the ledger: {error}") from error
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(
            f"the ledger {path} cannot be used: {error}; "
            "check the disk and its permissions, or move the file away to begin anew"
        ) from error
