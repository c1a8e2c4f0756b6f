"""What the server writes down: to its own output, engines' output also to files, prompts only when asked to.

No API key gets into any of it but into prompts, which are as they came.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from serving.config import LoggingConfig, served_name_of
from serving.folders import make_private

_ENGINES = "rigserve.engine"
_PROMPTS = "rigserve.prompts"
_FILE_BYTES = 10 * 1024 * 1024
_FILES_KEPT = 3
_FOLLOW_INTERVAL_SECONDS = 0.2
_SUFFIX = ".log"

# Each leaves what comes before the secret.
_SECRETS = (
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{6,}"),
    re.compile(
        r"(?i)(\b(?:x-api-key|authorization)[\"']?\s*[:=,]\s*b?[\"']?)(?!bearer|basic)[^\s\"',]+"
    ),
    re.compile(r"(?i)([?&](?:api[_-]?key|key|token|access_token|secret)=)[^\s&\"']+"),
    re.compile(r"()\bsk-[\w-]{12,}"),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
    re.compile(r"()\brs-[\w-]{40,}"),
    re.compile(r"()\bhf_\w{20,}"),
)


class LogError(Exception):
    """There is no such log; the message is for the person who asked."""


def set_up(config: LoggingConfig, folder: Path, *, verbose: bool = False) -> None:
    """Log as the config says; files go to ``folder``. Raises :class:`LogError` if that cannot be written."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(_JsonFormatter() if config.format == "json" else _HumanFormatter())
    level = logging.DEBUG if verbose else config.level.upper()
    logging.basicConfig(level=level, handlers=[output], force=True)
    # It warns of every bad form; whoever sent it is told, and nobody else needs to know.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        make_private(folder)
        logging.getLogger(_ENGINES).addHandler(_EngineFiles(folder))
        prompts = logging.getLogger(_PROMPTS)
        # Nowhere else, whatever the root logger does.
        prompts.propagate = False
        prompts.disabled = not config.prompts
        if config.prompts:
            prompts.setLevel(logging.INFO)
            prompts.addHandler(_PrivateFile(folder / "prompts.jsonl"))
    except OSError as error:
        raise LogError(f"cannot write logs to {folder}: {error.strerror}") from error


def lines_of(folder: Path, model: str | None, count: int, *, follow: bool) -> Iterator[str]:
    """The last ``count`` lines of the log of each engine of a model, or of all; with ``follow`` also those to come.

    Raises :class:`LogError` if there is no such log.
    """
    paths = _logs_of(folder, model)
    if not paths:
        whose = f"no engine of {model}" if model else "no engine"
        others = ", ".join(map(_engine_of, _logs_of(folder, None)))
        hint = f"; these have: {others}" if others else ""
        raise LogError(f"{whose} has written to {folder} yet{hint}")
    show_names = len(paths) > 1 or (follow and model is None)
    readers = {path: _Reader(path, show_name=show_names) for path in paths}
    for reader in readers.values():
        yield from reader.last(count)
    while follow:
        for path in _logs_of(folder, model):
            if path not in readers:  # an engine's first start
                readers[path] = _Reader(path, show_name=show_names)
            yield from readers[path].new()
        time.sleep(_FOLLOW_INTERVAL_SECONDS)


def _logs_of(folder: Path, model: str | None) -> list[Path]:
    """The logs of a model's engines, its replicas' included, or of one replica; None: of all there are."""
    paths = sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
    if model is None:
        return paths
    return [path for path in paths if model in (engine := _engine_of(path), served_name_of(engine))]


def _engine_of(path: Path) -> str:
    return unquote(path.name.removesuffix(_SUFFIX))


def redacted(text: str) -> str:
    """The text without the API keys that it shows."""
    for secret in _SECRETS:
        text = secret.sub(r"\1[redacted]", text)
    return text


class _HumanFormatter(logging.Formatter):
    """A line of text: when, unless systemd's journal notes that itself, and how bad, unless it is not."""

    def __init__(self) -> None:
        super().__init__()
        stat = os.fstat(sys.stderr.fileno())
        in_journal = os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
        self._time = None if in_journal else "%Y-%m-%d %H:%M:%S "

    def format(self, record: logging.LogRecord) -> str:
        time = self.formatTime(record, self._time) if self._time else ""
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return redacted(f"{time}{level}{super().format(record)}")


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if record.name == _ENGINES and isinstance(record.args, tuple):
            told["model"], told["message"] = map(str, record.args)
        else:
            told["message"] = record.getMessage()
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        texts = {name: redacted(value) for name, value in told.items() if isinstance(value, str)}
        return json.dumps(told | texts)


class _PrivateFile(RotatingFileHandler):
    """A file of bounded size that only its owner can read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=_FILE_BYTES, backupCount=_FILES_KEPT, encoding="utf-8")

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self.baseFilename, flags, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A full disk costs lines of the log, and nothing else."""


class _EngineFiles(logging.Handler):
    """What each engine prints, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._files: dict[str, _PrivateFile] = {}

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        model, line = map(str, record.args)
        try:
            if model not in self._files:
                path = self._folder / f"{quote(model, safe='')}{_SUFFIX}"
                self._files[model] = _PrivateFile(path)
        except OSError:
            return
        told = logging.makeLogRecord({"msg": redacted(line)})
        self._files[model].emit(told)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        super().close()


class _Reader:
    """Reads a file that is rotated while it is read."""

    def __init__(self, path: Path, *, show_name: bool) -> None:
        self._path = path
        self._prefix = f"[{_engine_of(path)}] " if show_name else ""
        self._file = path.open(encoding="utf-8", errors="replace")
        self._rest = ""

    def last(self, count: int) -> list[str]:
        return self.new()[-count:] if count else self.new()[:0]

    def new(self) -> list[str]:
        lines = self._read()
        try:
            if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
                lines += self._read()  # what came just before the file was rotated
                self._file.close()
                self._file = self._path.open(encoding="utf-8", errors="replace")
                lines += self._read()
        except FileNotFoundError:
            pass  # it is being rotated just now
        return lines

    def _read(self) -> list[str]:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        return [self._prefix + line for line in lines]
