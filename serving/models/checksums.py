"""SHA-256 of model files: computed once for each state of a file, and compared with what a config says."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from serving.folders import make_private
from serving.models.sources import ModelError

_FIRST_PART = re.compile(r"(.+)-00001-of-(\d{5})(\.[^.]+)")


def digest_of(path: Path, cache_dir: Path | None = None) -> str:
    """SHA-256 of a file, or of all files of a folder or of a GGUF model in parts, in hexadecimal.

    Of several files it is that of what ``sha256sum`` prints of them, in the order of their names; hidden ones of a
    folder do not count. A file's own is remembered in ``cache_dir``, if there is one, for as long as its size, times
    and place on the disk stay the same. May take long; raises OSError.
    """
    if path.is_dir():
        return _digest_of_several(path, _files_below(path), cache_dir)
    first = _FIRST_PART.fullmatch(path.name)
    if first is None:
        return _digest_of_file(path, cache_dir)
    stem, count, suffix = first.groups()
    parts = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    return _digest_of_several(path.parent, parts, cache_dir)


def verify(path: Path, expected: str | None, cache_dir: Path, key: str) -> None:
    """Raise :class:`ModelError` unless a file's digest is the ``expected`` one, which the config's ``key`` has.

    None expects nothing, and the file is not read.
    """
    if expected is None:
        return
    try:
        found = digest_of(path, cache_dir)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ModelError(f"cannot check {path}:{where} {error.strerror or error}") from error
    if found != expected:
        raise ModelError(
            f"{path} is not the file that {key} names: its SHA-256 is {found}, and {expected} is wanted; "
            f"fetch it again, or correct {key}"
        )


def _files_below(folder: Path) -> list[str]:
    names = [each.relative_to(folder) for each in folder.rglob("*") if each.is_file()]
    seen = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return sorted((name.as_posix() for name in seen), key=os.fsencode)


def _digest_of_several(folder: Path, names: Sequence[str], cache_dir: Path | None) -> str:
    lines = [f"{_digest_of_file(folder / name, cache_dir)}  {name}\n" for name in names]
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def _digest_of_file(path: Path, cache_dir: Path | None) -> str:
    if cache_dir is None:
        return _read(path)
    state = _state(path)
    identity = json.dumps([str(path.resolve()), *state])
    memo = cache_dir / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.sha256"
    if memo.exists():
        remembered = memo.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}", remembered):  # else a crash left it half written
            return remembered.decode()
    digest = _read(path)
    if _state(path) == state:  # else it was written to meanwhile
        make_private(cache_dir)
        memo.write_text(digest)
    return digest


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    # The time of the last change of anything (ctime) cannot be set by programs.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
