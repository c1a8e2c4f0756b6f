"""The ledger loses nothing while its process lives, and next to nothing when it is killed."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from serving.cost.ledger import Ledger, LedgerError, UsageRecord, read_spending, read_traffic
from serving.cost.rollup import Selection
from serving.cost.spool import Spool
from tests.processes import wait_for

RECORD = UsageRecord(
    started_at=1000.0, request_id="r", user="-", model="m", engine="llama_cpp",
    endpoint="/v1/chat/completions", status=200, streamed=True, prompt_tokens=10, cached_tokens=4,
    completion_tokens=5, tokens_source="engine", queue_seconds=0.1, prefill_seconds=0.2,
    decode_seconds=0.3, prefill_busy_seconds=0.2, decode_busy_seconds=0.25, timing_source="engine",
    energy_joules=3.0, energy_source="nvml", energy_usd=1e-6, idle_usd=1e-7, hardware_usd=1e-5,
)  # fmt: skip

WRITER = """
import sys
from pathlib import Path
from serving.cost.ledger import Ledger
from tests.unit.test_ledger import RECORD
ledger = Ledger(Path(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    ledger.append(RECORD)
ledger.close()
"""

# Appends for ever, and says how many before each.
ENDLESS_WRITER = """
import itertools, sys, time
from pathlib import Path
from serving.cost.ledger import Ledger
from tests.unit.test_ledger import RECORD
ledger = Ledger(Path(sys.argv[1]))
for count in itertools.count():
    print(count, flush=True)
    ledger.append(RECORD)
    time.sleep(0.002)
"""

# Keeps a database locked until its input ends.
LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""

# Fills what it may write of a file, then gets more room.
FULL_DISK_WRITER = """
import resource, sys
from pathlib import Path
from serving.cost.ledger import Ledger, LedgerError
from tests.unit.test_ledger import RECORD
ledger = Ledger(Path(sys.argv[1]))
ledger.append(RECORD)
ledger.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))
for _ in range(3000):
    ledger.append(RECORD)
try:
    ledger.flush()
    sys.exit("the disk was not full")
except LedgerError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
ledger.append(RECORD)
ledger.close()
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    with start(LOCKER, path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            process.stdin.close()


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM usage").fetchone()[0])


def test_what_is_appended_can_be_read_and_summed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.append(RECORD)
    ledger.append(replace(RECORD, model="other", started_at=2000.0, energy_source="estimated"))
    ledger.flush()
    both = read_traffic(path)
    assert (both.requests, both.prompt_tokens, both.cached_tokens, both.completion_tokens) == (
        2,
        20,
        8,
        10,
    )
    assert both.energy_joules == pytest.approx(6.0)
    assert both.energy_source == "mixed"
    assert both.timing_source == "engine"
    assert read_traffic(path, Selection(model="m")).energy_source == "nvml"
    assert read_traffic(path, Selection(since=1500.0)).requests == 1
    with pytest.raises(LedgerError, match="no such requests"):
        read_traffic(path, Selection(model="nobody"))
    ledger.close()
    assert rows(path) == 2  # each was written once


def test_every_field_is_a_column(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.append(RECORD)
    ledger.close()
    with closing(sqlite3.connect(tmp_path / "l.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        row = dict(connection.execute("SELECT * FROM usage").fetchone())
    del row["id"], row["uid"]
    assert UsageRecord(**row) == RECORD


def test_records_are_committed_without_being_asked(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "l.sqlite")) as ledger:
        ledger.append(RECORD)
        wait_for(lambda: rows(tmp_path / "l.sqlite") == 1, "the row")


def test_two_processes_write_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    writers = [start(WRITER, path, 3000) for _ in range(2)]
    for process in writers:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    traffic = read_traffic(path)
    assert (traffic.requests, traffic.prompt_tokens) == (6000, 60_000)
    assert traffic.energy_joules == pytest.approx(18_000.0)


def test_a_new_ledger_waits_for_another_that_is_being_made(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")  # the lock under which the other process sets up
        release = threading.Timer(0.5, other.execute, ["ROLLBACK"])
        release.start()
        Ledger(path).close()
        release.join()
    assert rows(path) == 0


def test_a_killed_process_loses_at_most_the_last_second(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    process = start(ENDLESS_WRITER, path)
    assert process.stdout is not None
    seen: list[tuple[float, int]] = []
    for line in process.stdout:
        seen.append((time.monotonic(), int(line)))
        if seen[-1][0] - seen[0][0] > 2.2:
            break
    process.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    process.communicate()
    safe = max(count for moment, count in seen if moment < killed_at - 1.0)
    assert safe > 50
    assert rows(path) >= safe
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    survivors = rows(path)
    with closing(Ledger(path)) as ledger:
        ledger.append(RECORD)
    assert rows(path) == survivors + 1


def test_a_locked_database_delays_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.database._BUSY_SECONDS", 0.1)
    path = tmp_path / "l.sqlite"
    with closing(Ledger(path)) as ledger:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for _ in range(10):
                ledger.append(RECORD)
            with pytest.raises(LedgerError, match="locked"):
                ledger.flush()
            ledger.append(RECORD)
            other.execute("ROLLBACK")
        wait_for(lambda: rows(path) == 11, "the writer's next try")


def test_a_full_disk_delays_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    output, errors = start(FULL_DISK_WRITER, path).communicate(timeout=30)
    assert "cannot be used" in output, errors
    assert rows(path) == 3002
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_cannot_be_written_is_spooled_and_outlives_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.database._BUSY_SECONDS", 0.1)
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    with locked_by_another_process(path):
        ledger.append(RECORD)
        spool = tmp_path / "l.spool"
        wait_for(lambda: list(spool.glob("*.jsonl")), "the first is spooled")
        assert ledger.waiting == 1
        ledger.append(replace(RECORD, user="\ud800"))  # as no database takes it
        ledger.append(RECORD)
        ledger.close()
        assert {each.stat().st_mode & 0o777 for each in spool.iterdir()} == {0o600}
        assert spool.stat().st_mode & 0o777 == 0o700
    assert "3 usage records wait in" in caplog.text
    assert rows(path) == 0
    with closing(Ledger(path)) as again:
        assert rows(path) == 2
        assert again.waiting == 0
    assert not list(spool.iterdir())
    assert "cannot be stored" in caplog.text


def test_a_spool_that_was_written_already_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.database._BUSY_SECONDS", 0.1)
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    with locked_by_another_process(path):
        for _ in range(5):
            ledger.append(RECORD)
        ledger.close()
    (file,) = (tmp_path / "l.spool").iterdir()
    spooled = file.read_bytes()
    Ledger(path).close()
    assert rows(path) == 5
    # The process that wrote it ended before it could remove it.
    file.write_bytes(spooled)
    Ledger(path).close()
    assert rows(path) == 5
    assert not file.exists()


def test_a_database_that_becomes_read_only_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with closing(Ledger(path)) as ledger:
        ledger._connection.execute("PRAGMA query_only=ON")  # permissions do not stop root
        ledger.append(RECORD)
        wait_for(lambda: list((tmp_path / "l.spool").glob("*.jsonl")), "the record is spooled")
        ledger.append(RECORD)
        ledger._connection.execute("PRAGMA query_only=OFF")
        wait_for(lambda: rows(path) == 2, "the writer's next try")
        # Rows are to be seen a moment before the writer counts them.
        wait_for(lambda: not ledger.waiting, "nothing waits")


def test_a_ledger_that_must_close_unwritten_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.database._BUSY_SECONDS", 0.1)
    path = tmp_path / "l.sqlite"
    (tmp_path / "l.spool").write_text("no folder")
    ledger = Ledger(path)
    with locked_by_another_process(path):
        ledger.append(RECORD)
        ledger.append(RECORD)
        with pytest.raises(LedgerError, match="locked"):
            ledger.close()
    assert "2 usage records could not be written and are lost" in caplog.text


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_ledger_of_the_format_before_is_taken_on(tmp_path: Path, version: int) -> None:
    path = tmp_path / "l.sqlite"
    with closing(Ledger(path)) as ledger:
        ledger.append(RECORD)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER usage_rolled_up")
        connection.execute("DROP TABLE usage_daily")
        newer = ["base_model", "service_tier", "idle_joules"]
        if version < 4:
            newer += ["api_usd", "route", "served_as"]
        for column in newer:
            connection.execute(f"ALTER TABLE usage DROP COLUMN {column}")
        if version == 2:
            connection.execute("DROP INDEX usage_uid")
            connection.execute("ALTER TABLE usage DROP COLUMN uid")
        connection.execute(f"PRAGMA user_version={version}")
    # Whoever comes first, a report or a server, takes it on; what was there is rolled up, too.
    assert read_traffic(path).requests == 1
    with closing(Ledger(path)) as ledger:
        ledger.append(RECORD)
    assert rows(path) == 2
    assert read_traffic(path).requests == 2


def test_what_an_older_version_has_spooled_is_written(tmp_path: Path) -> None:
    # The columns since then: api_usd, route, served_as, base_model, service_tier, idle_joules.
    old = astuple(RECORD)[:-6]
    Spool(tmp_path / "l.spool").add([(*old, "uid")])
    with closing(Ledger(tmp_path / "l.sqlite")) as ledger:
        ledger.append(replace(RECORD, api_usd=0.5, model="m"))
    assert rows(tmp_path / "l.sqlite") == 2
    assert read_spending(tmp_path / "l.sqlite", 0.0) == {"m": 0.5}


def test_tokens_that_were_counted_by_chunks_make_the_traffic_an_estimate(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    for source, estimated in (("engine", False), ("estimated", True)):
        with closing(Ledger(path)) as ledger:
            ledger.append(replace(RECORD, tokens_source=source))
        assert read_traffic(path).estimated is estimated
    assert read_traffic(path).tokens_source == "mixed"


def test_what_other_servers_did_is_not_the_rigs_work(tmp_path: Path) -> None:
    with closing(Ledger(tmp_path / "l.sqlite")) as ledger:
        ledger.append(RECORD)
        ledger.append(replace(RECORD, engine="remote", api_usd=0.5))
    assert read_traffic(tmp_path / "l.sqlite").requests == 1


def test_a_record_that_cannot_be_stored_does_not_hold_up_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.append(replace(RECORD, user="\ud800"))  # half a character, as JSON can carry
    ledger.append(replace(RECORD, energy_joules=float("nan")))
    ledger.append(replace(RECORD, prompt_tokens=2**63))
    ledger.append(RECORD)
    ledger.close()
    assert rows(path) == 1
    assert caplog.text.count("cannot be stored") == 3


def test_what_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"this is not a database" * 100)
    with pytest.raises(LedgerError, match="not a database"):
        Ledger(path)
    with pytest.raises(LedgerError, match="there is no ledger"):
        read_traffic(tmp_path / "gone.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"storage\.data_dir"):
        Ledger(tmp_path / "file" / "l.sqlite")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(LedgerError, match="newer rigserve"):
        Ledger(path)
    with pytest.raises(LedgerError, match="newer rigserve"):
        read_traffic(path)


def test_appending_does_not_wait_for_the_database(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with (
        closing(Ledger(path)) as ledger,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        ledger.append(RECORD)
        # It would wait for five seconds.
        assert time.monotonic() - started < 3
        other.execute("ROLLBACK")
