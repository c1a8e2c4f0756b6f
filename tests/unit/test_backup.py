"""What was backed up while it was written to comes back whole; what is damaged changes nothing."""

from __future__ import annotations

import gzip
import io
import os
import re
import sqlite3
import stat
import tarfile
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from serving.cli import main
from serving.cost.ledger import Ledger, read_traffic
from serving.cost.spool import Spool
from serving.keys.store import KeyStore
from serving.maintenance import upgrade
from serving.maintenance.backup import BackupError, back_up, restore
from serving.maintenance.upgrade import check_upgrade
from serving.protocol.keys import NewKey
from tests.unit.test_ledger import RECORD, rows

CONFIG = "models: [{name: m, source: hf://org/repo/file.gguf}]\nstorage: {data_dir: DATA}\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder in which something is of each kind."""
    folder = tmp_path / "data"
    with closing(Ledger(folder / "ledger.sqlite")) as ledger:
        ledger.append(RECORD)
    with closing(KeyStore(folder)) as keys:
        keys.create(NewKey(name="alice"))
    (folder / "files").mkdir()
    (folder / "files" / "file-1").write_bytes(b"{}")
    (folder / "logs").mkdir()
    (folder / "logs" / "m.log").write_text("not in a backup")
    (tmp_path / "rig.yaml").write_text(CONFIG.replace("DATA", str(folder)))
    return folder


def test_what_was_saved_comes_back(data: Path, tmp_path: Path) -> None:
    config, archive = tmp_path / "rig.yaml", tmp_path / "b.tar.gz"
    backup = back_up(data, config, archive)
    assert backup.formats.keys() == {"keys.sqlite", "ledger.sqlite"}
    # It has hashes of keys, and what users uploaded.
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    there, new_config = tmp_path / "elsewhere" / "data", tmp_path / "new.yaml"
    restored, aside = restore(archive, there, new_config)
    assert (restored, aside) == (backup, None)
    assert new_config.read_text() == config.read_text()
    assert rows(there / "ledger.sqlite") == 1
    with closing(KeyStore(there)) as keys:
        assert keys.get("alice").name == "alice"
    assert sorted(path.name for path in there.iterdir() if not path.name.startswith("keys")) == [
        "files",
        "ledger.sqlite",
    ]
    assert (there / "files" / "file-1").read_bytes() == b"{}"
    assert not list(tmp_path.glob(".*"))


def test_a_backup_under_writes_is_of_one_moment(data: Path, tmp_path: Path) -> None:
    done = threading.Event()
    with closing(Ledger(data / "ledger.sqlite")) as ledger:

        def write() -> None:
            while not done.is_set():
                # Two at a time, committed together: a half is never seen.
                ledger.append(replace(RECORD, request_id="twin"))
                ledger.append(replace(RECORD, request_id="twin"))
                ledger.flush()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for number in range(5):
                back_up(data, tmp_path / "rig.yaml", tmp_path / f"{number}.tar.gz")
        finally:
            done.set()
            writer.join()
    counts = []
    for number in range(5):
        there = tmp_path / str(number)
        restore(tmp_path / f"{number}.tar.gz", there, tmp_path / "rig.yaml")
        counts.append(rows(there / "ledger.sqlite"))
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert all(count % 2 == 1 for count in counts)


def test_what_waits_for_the_ledger_is_saved_and_written_once(data: Path, tmp_path: Path) -> None:
    (waiting := Spool(data / "ledger.spool")).add([(*_values(), "uid-1")])
    back_up(data, tmp_path / "rig.yaml", tmp_path / "b.tar.gz")
    assert waiting.files()
    there = tmp_path / "there"
    restore(tmp_path / "b.tar.gz", there, tmp_path / "rig.yaml")
    for _ in range(2):
        Ledger(there / "ledger.sqlite").close()
        assert rows(there / "ledger.sqlite") == 2


def _values() -> list[object]:
    return [getattr(RECORD, name) for name in RECORD.__slots__]


def test_what_is_there_moves_aside(data: Path, tmp_path: Path) -> None:
    back_up(data, tmp_path / "rig.yaml", tmp_path / "b.tar.gz")
    with closing(Ledger(data / "ledger.sqlite")) as ledger:
        ledger.append(RECORD)
    _, aside = restore(tmp_path / "b.tar.gz", data, tmp_path / "rig.yaml")
    assert aside is not None
    assert (rows(aside / "ledger.sqlite"), rows(data / "ledger.sqlite")) == (2, 1)


def test_what_no_backup_holds_stays_in_its_place(data: Path, tmp_path: Path) -> None:
    back_up(data, tmp_path / "rig.yaml", tmp_path / "b.tar.gz")
    # An environment of Python's works at its own path only.
    (python := data / "engines" / "vllm" / "python").parent.mkdir(parents=True)
    python.touch()
    place = data.stat().st_ino
    _, aside = restore(tmp_path / "b.tar.gz", data, tmp_path / "rig.yaml")
    assert python.exists()
    assert (data / "logs" / "m.log").exists()
    # A volume of a container, which is nobody's to rename.
    assert data.stat().st_ino == place
    assert aside is not None
    assert aside.parent == data
    assert {path.name for path in tmp_path.iterdir()} == {"data", "rig.yaml", "b.tar.gz"}


def test_what_fails_half_way_is_undone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back_up(data, tmp_path / "rig.yaml", tmp_path / "b.tar.gz")

    def there() -> list[str]:
        names = [path.relative_to(data).as_posix() for path in data.rglob("*")]
        return sorted(name for name in names if not name.endswith(("-wal", "-shm")))

    rename, names = Path.rename, there()

    def full(path: Path, target: Path) -> Path:
        if ".restore-" in str(path) and path.name == "files":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(BackupError, match=r"nothing is restored .*No space left"):
        restore(tmp_path / "b.tar.gz", data, tmp_path / "rig.yaml")
    assert there() == names
    assert rows(data / "ledger.sqlite") == 1


def test_root_puts_back_what_is_the_servers(data: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    back_up(data, tmp_path / "rig.yaml", tmp_path / "b.tar.gz")
    os.chown(data, 10001, 10001)
    restore(tmp_path / "b.tar.gz", data, tmp_path / "rig.yaml")
    for path in (data / "ledger.sqlite", data / "files", data / "files" / "file-1"):
        assert (path.stat().st_uid, path.stat().st_gid) == (10001, 10001)


def test_nothing_is_restored_under_a_running_server(data: Path, tmp_path: Path) -> None:
    back_up(data, tmp_path / "rig.yaml", tmp_path / "b.tar.gz")
    with closing(Ledger(data / "ledger.sqlite")):
        with pytest.raises(BackupError, match="stop the server"):
            restore(tmp_path / "b.tar.gz", data, tmp_path / "rig.yaml")
        assert rows(data / "ledger.sqlite") == 1


def _unzipped(archive: Path) -> bytes:
    return gzip.decompress(archive.read_bytes())


@pytest.mark.parametrize("damage", ["cut", "bit", "other", "escape", "empty"])
def test_a_damaged_backup_changes_nothing(data: Path, tmp_path: Path, damage: str) -> None:
    archive = tmp_path / "b.tar.gz"
    back_up(data, tmp_path / "rig.yaml", archive)
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:-200])
    elif damage == "bit":
        content = _unzipped(archive)
        archive.write_bytes(gzip.compress(content.replace(b"alice", b"alive")))
        assert _unzipped(archive) != content
    elif damage == "other":
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(tmp_path / "rig.yaml", "config.yaml")
    elif damage == "escape":
        with tarfile.open(archive, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("../outside"), io.BytesIO())
    else:
        archive.write_bytes(b"")
    with pytest.raises(BackupError, match=r"damaged|is no backup"):
        restore(archive, data, tmp_path / "rig.yaml")
    assert rows(data / "ledger.sqlite") == 1
    assert not (tmp_path / "outside").exists()
    assert not list(data.glob(".restore-*"))
    with pytest.raises(BackupError):
        restore(archive, tmp_path / "new", tmp_path / "rig.yaml")
    assert not (tmp_path / "new").exists()


def test_the_commands(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, archive = str(tmp_path / "rig.yaml"), str(tmp_path / "b.tar.gz")
    assert main(["backup", config, "--out", archive]) == 0
    assert main(["backup", config, "--out", archive]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["backup", config, "--out", str(tmp_path / "nowhere" / "b.tar.gz")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert main(["restore", config, "--from", archive]) == 0
    assert "before-restore" in capsys.readouterr().out
    moved = tmp_path / "moved.yaml"
    assert main(["restore", str(moved), "--from", archive]) == 2
    assert "--data-dir" in capsys.readouterr().err
    there = str(tmp_path / "there")
    assert main(["restore", str(moved), "--from", archive, "--data-dir", there]) == 0
    assert moved.exists()
    assert main(["upgrade", "--check", config]) == 0
    assert "ledger.sqlite: format" in capsys.readouterr().out


# The ledger as each earlier format made it, word for word.
_COMMON = """started_at REAL NOT NULL, request_id TEXT NOT NULL, user TEXT NOT NULL, model TEXT NOT NULL,
    engine TEXT NOT NULL, endpoint TEXT NOT NULL, status INTEGER NOT NULL, streamed INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    tokens_source TEXT NOT NULL, queue_seconds REAL NOT NULL, prefill_seconds REAL NOT NULL,
    decode_seconds REAL NOT NULL, prefill_busy_seconds REAL NOT NULL, decode_busy_seconds REAL NOT NULL,
    timing_source TEXT NOT NULL, energy_joules REAL NOT NULL, energy_source TEXT NOT NULL,
    energy_usd REAL NOT NULL, idle_usd REAL NOT NULL, hardware_usd REAL NOT NULL"""
_KEYS = ", key_id TEXT NOT NULL, tenant TEXT NOT NULL"
_ROUTES = ", api_usd REAL NOT NULL, route TEXT NOT NULL, served_as TEXT NOT NULL"
EARLIER_LEDGERS = {
    1: _COMMON,
    2: _COMMON + _KEYS,
    3: _COMMON + _KEYS + ", uid TEXT",
    4: _COMMON + _KEYS + _ROUTES + ", uid TEXT",
}
_OLD_VALUES = (
    *(1000.0, "old", "-", "m", "llama_cpp", "/v1/completions", 200, 1, 10, 4, 5, "engine"),
    *(0.1, 0.2, 0.3, 0.2, 0.25, "engine", 3.0, "nvml", 1e-6, 1e-7, 1e-5),
)
_OLD_ADDITIONS = {1: (), 2: ("key", "team"), 3: ("key", "team", "u1")}
_OLD_ADDITIONS[4] = ("key", "team", 0.0, "-", "-", "u1")  # type: ignore[assignment]


def write_ledger_of(version: int, path: Path) -> None:
    """A ledger with a row, as a server of an earlier version left it."""
    values = (*_OLD_VALUES, *_OLD_ADDITIONS[version])
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(
            f"CREATE TABLE usage (id INTEGER PRIMARY KEY, {EARLIER_LEDGERS[version]})"
        )
        connection.execute("CREATE INDEX usage_started_at ON usage (started_at)")
        if version >= 3:
            connection.execute("CREATE UNIQUE INDEX usage_uid ON usage (uid)")
        marks = ", ".join("?" for _ in values)
        connection.execute(f"INSERT INTO usage VALUES (NULL, {marks})", values)  # noqa: S608 (marks only)
        connection.execute(f"PRAGMA user_version={version}")
        connection.commit()


@pytest.mark.parametrize("version", EARLIER_LEDGERS)
def test_a_ledger_of_each_earlier_format_is_taken_on(tmp_path: Path, version: int) -> None:
    path = tmp_path / "data" / "ledger.sqlite"
    write_ledger_of(version, path)
    before = path.read_bytes()
    [outcome] = check_upgrade(path.parent)
    assert outcome.before == version
    assert outcome.problem is None
    assert outcome.after is not None
    assert outcome.after >= 4
    # The check has changed nothing.
    assert path.read_bytes() == before
    with closing(Ledger(path)) as ledger:
        ledger.append(RECORD)
    traffic = read_traffic(path)
    assert (traffic.requests, traffic.prompt_tokens, traffic.energy_joules) == (2, 20, 6.0)
    [again] = check_upgrade(path.parent)
    assert again.before == again.after == outcome.after


def test_the_first_ledgers_rows_have_no_key(tmp_path: Path) -> None:
    path = tmp_path / "data" / "ledger.sqlite"
    write_ledger_of(1, path)
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute("SELECT key_id, tenant, api_usd, route, served_as, uid FROM usage")
        assert row.fetchone() == ("-", "-", 0.0, "-", "-", None)


def test_no_database_is_forgotten() -> None:
    """All that a server makes in its data folder are tried."""
    serving = Path(__file__).parents[2] / "serving"
    named = {
        name
        for path in serving.rglob("*.py")
        for name in re.findall(r'"(\w+\.sqlite)"', path.read_text())
    }
    assert set(upgrade.DATABASES) == named


def test_data_of_a_newer_version_is_told_before_the_server_is_started(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(data / "keys.sqlite")) as connection:
        connection.execute("PRAGMA user_version=99")
    assert main(["upgrade", "--check", str(tmp_path / "rig.yaml")]) == 1
    told = capsys.readouterr().out
    assert "keys.sqlite: cannot be taken on: " in told
    assert "written by a newer rigserve" in told
    assert str(data) in told
