"""Backups of a server's data: made while it runs, put back while it does not.

A backup is an archive (tar, gzip) of the databases, the files of batches, usage that waits for the ledger, and
the config. Each database is as it was at one moment, by SQLite's own online backup.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from serving import __version__
from serving.folders import make_private

# Of rows that are in both, the ledger takes one: so what waits for it is copied before it is.
_FOLDERS = ("ledger.spool", "files")
_CONFIG = "config.yaml"
_MANIFEST = "manifest.json"
_LONGEST_NAME = 4096


class BackupError(Exception):
    """A backup cannot be made or put back; the message says why."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds. ``formats`` are the databases' by their names, ``digests`` SHA-256 of all files."""

    version: str
    made_unix: float
    formats: dict[str, int]
    digests: dict[str, str]


def back_up(data_dir: Path, config: Path, archive: Path) -> Backup:
    """Write an archive, readable by its owner only, whole or not at all. Raises :class:`BackupError`."""
    if archive.exists():
        raise BackupError(f"{archive} is there already; name another file")
    if not data_dir.is_dir():
        raise BackupError(
            f"there is no {data_dir}; see storage.data_dir, or serve some requests first"
        )
    with (
        _told(f"cannot write {archive}"),
        tempfile.TemporaryDirectory(dir=archive.absolute().parent, prefix=".backup-") as folder,
    ):
        copies, formats = Path(folder) / "data", dict[str, int]()
        copies.mkdir()
        for name in _FOLDERS:
            _copy_folder(data_dir / name, copies / name)
        for database in sorted(data_dir.glob("*.sqlite")):
            formats[database.name] = copy_database(database, copies / database.name)
        (copies / _CONFIG).write_bytes(config.read_bytes())
        digests = {str(path.relative_to(copies)): _digest(path) for path in _files_in(copies)}
        backup = Backup(__version__, time.time(), formats, digests)
        manifest = json.dumps(
            {"version": backup.version, "made_unix": backup.made_unix}
            | {"formats": formats, "digests": digests},
            indent=2,
        )
        (copies / _MANIFEST).write_text(manifest)
        part = Path(folder) / "archive"
        with (
            open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file,
            tarfile.open(fileobj=file, mode="w:gz") as tar,
        ):
            for path in _files_in(copies):
                tar.add(path, arcname=str(path.relative_to(copies)))
            file.flush()
            os.fsync(file.fileno())
        part.rename(archive)
    return backup


def restore(archive: Path, data_dir: Path, config: Path) -> tuple[Backup, Path | None]:
    """Put a backup's data into ``data_dir``, and its config to ``config`` if there is none.

    Nothing is changed unless all of the archive is whole. What was there of such data moves aside, into a folder within
    ``data_dir``; gives where to. All else that is there, such as installed engines, stays in its place.
    Raises :class:`BackupError`, also while a server has the databases open.
    """
    is_new = not data_dir.exists()
    with _told(f"nothing is restored to {data_dir}"):
        make_private(data_dir)
        try:
            # Within it, as it may be all that can be written to: a volume of a container, the state of a service.
            with tempfile.TemporaryDirectory(dir=data_dir, prefix=".restore-") as folder:
                copies = Path(folder)
                backup = _unpacked(archive, copies)
                (copies / _MANIFEST).unlink()
                restored_config = (copies / _CONFIG).read_bytes()
                (copies / _CONFIG).unlink()
                _refuse_if_in_use(data_dir)
                _own_as(data_dir, copies)
                aside = _exchange(copies, data_dir)
        except BaseException:
            if is_new:
                data_dir.rmdir()
            raise
    with _told(f"the data is restored, but cannot write {config}"):
        if not config.exists():
            config.write_bytes(restored_config)
    return backup, aside


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of the system's becomes a :class:`BackupError`, which says what could not be done."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise BackupError(f"{what}: {where}{error.strerror or error}") from error


def _exchange(copies: Path, data_dir: Path) -> Path | None:
    """Move what is in ``copies`` into the data folder, and what was there aside; all of it, or nothing if that fails."""
    aside = data_dir / f"before-restore-{time.time_ns()}"
    there = [*data_dir.glob("*.sqlite*"), *(data_dir / name for name in _FOLDERS)]
    moves = [(path, aside / path.name) for path in there if path.exists()]
    if moves:
        aside.mkdir(mode=0o700)
        _own_as(data_dir, aside)
    moves += [(path, data_dir / path.name) for path in copies.iterdir()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        if aside.exists():
            aside.rmdir()
        raise
    return aside if aside.exists() else None


def _own_as(data_dir: Path, folder: Path) -> None:
    """What root puts back is the server's, whose the data folder is."""
    if os.geteuid() == 0:
        owner = data_dir.stat()
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid)


def _unpacked(archive: Path, folder: Path) -> Backup:
    """All files of an archive, each checked."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = tar.getmembers()
            for member in members:
                place = PurePosixPath(member.name)
                if not member.isfile() or place.is_absolute() or ".." in place.parts:
                    raise BackupError(
                        f"{archive} is no backup: it holds {member.name[:_LONGEST_NAME]!r}"
                    )
            tar.extractall(folder, members, filter="data")
        told = json.loads((folder / _MANIFEST).read_text())
        backup = Backup(told["version"], told["made_unix"], told["formats"], told["digests"])
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{archive} is no backup, or is damaged: {error}") from error
    found = {
        str(path.relative_to(folder)): _digest(path)
        for path in _files_in(folder)
        if path.name != _MANIFEST
    }
    if found != backup.digests or _CONFIG not in found:
        raise BackupError(f"{archive} is damaged: its files are not those of its manifest")
    for name in backup.formats:
        (folder / name).chmod(0o600)
        with _opened(folder / name) as connection:
            if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                raise BackupError(f"{archive} is damaged: {name} is not whole")
    return backup


def _refuse_if_in_use(data_dir: Path) -> None:
    for database in data_dir.glob("*.sqlite"):
        with _opened(database) as connection:
            try:
                # A connection of anybody else's, even an idle one, forbids to leave WAL mode.
                connection.execute("PRAGMA journal_mode=DELETE")
            except sqlite3.OperationalError as error:
                raise BackupError(
                    f"{database} is in use ({error}); stop the server, then restore"
                ) from error


def copy_database(source: Path, copy: Path) -> int:
    """Copy a database that others may be writing to, as of one moment; gives its format. Raises :class:`BackupError`."""
    uri = f"{source.resolve().as_uri()}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(uri, uri=True)) as read,
            closing(sqlite3.connect(copy)) as written,
        ):
            read.backup(written)
            return int(written.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error as error:
        raise BackupError(f"{source} cannot be read: {error}") from error


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(database, timeout=1.0, isolation_level=None)) as connection:
        yield connection


def _copy_folder(source: Path, copy: Path) -> None:
    """Files that are whole; one that is removed meanwhile is left out."""
    for path in _files_in(source):
        target = copy / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_bytes(path.read_bytes())
        except FileNotFoundError:
            target.unlink(missing_ok=True)


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
