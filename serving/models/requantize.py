"""Prepared models: copies in the quantization that suits the rig, made once and kept in a cache.

``python -m serving.models.requantize SOURCE TARGET TYPE`` makes one copy. It runs as a process of its own,
so that a crash in native code, or what it prints, stays away from the server.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock

from serving.folders import make_private
from serving.models.checksums import digest_of
from serving.models.gguf import GgufError, read_header
from serving.models.sources import ModelError

_log = logging.getLogger(__name__)

# ``enum llama_ftype`` of llama.h, for the types that ``quantization:`` may name.
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10,
    "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16,
    "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
TYPES = tuple(_FILE_TYPES)


def prepare(source: Path, quantization: str | None, cache_dir: Path) -> Path:
    """A file with the source's model in the given type: the source itself if None is asked for, or if it has that type.

    Made once and kept in ``cache_dir`` under the source's digest and the type. Safe when several processes
    ask at once: one works, the others wait. Raises :class:`ModelError`.
    """
    if quantization is None or _file_type(source) == _FILE_TYPES[quantization]:
        return source
    try:
        make_private(cache_dir)
        target = (
            cache_dir / f"{source.stem}-{digest_of(source, cache_dir)[:16]}-{quantization}.gguf"
        )
        if target.exists():
            return target
        # One lock for the folder: requantizing takes every core, and what is unfinished here is then stale.
        with filelock.FileLock(cache_dir / ".lock"):
            if not target.exists():
                _make(source, target, quantization)
    except OSError as error:
        raise ModelError(
            f"cannot prepare {source.name} in {cache_dir}: {error.strerror or error}; "
            "see storage.cache_dir"
        ) from error
    return target


def type_name(file_type: int | None) -> str | None:
    """What a header's ``file_type`` is called in a config; None if it has no such name."""
    return next((name for name, number in _FILE_TYPES.items() if number == file_type), None)


def requantize(source: Path, target: Path, quantization: str) -> None:
    """Write the source's model in the given type, in a process of its own; raises :class:`ModelError`.

    ``target`` may be left unfinished.
    """
    command: list[str | Path] = [sys.executable, "-m", "serving.models.requantize"]
    command += [source, target, quantization]
    # The open pipe is the child's leash: it ends when this process does.
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr is not None
        last_words = process.stderr.read()
    if process.returncode != 0:
        reason = _reason(process.returncode, last_words, source, target.parent)
        raise ModelError(f"cannot requantize {source} to {quantization}: {reason}")
    with target.open("rb") as file:
        os.fsync(file.fileno())


def _make(source: Path, target: Path, quantization: str) -> None:
    """Write to a temporary name first: under the final name there are only whole files."""
    for stale in target.parent.glob("*.gguf.*.partial"):
        stale.unlink()
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    _log.info("preparing %s as %s (once; kept in %s)", source.name, quantization, target.parent)
    started = time.monotonic()
    try:
        requantize(source, partial, quantization)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    _log.info("prepared %s in %.1f s", target.name, time.monotonic() - started)


def _reason(code: int, last_words: bytes, source: Path, folder: Path) -> str:
    """Why the child failed, from its end, the room on the disk, and its last words."""
    reasons = []
    if code < 0:
        reasons.append(f"the process was killed by {signal.Signals(-code).name}")
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < source.stat().st_size:
        reasons.append(
            f"only {free_bytes / 1e6:.0f} MB are free in {folder}; "
            "make room, or set storage.cache_dir to another disk"
        )
    reasons += last_words.decode("utf-8", errors="replace").strip().splitlines()[-3:]
    return "; ".join(reasons)


def _file_type(source: Path) -> int | None:
    try:
        return read_header(source).file_type
    except (GgufError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot use {source}: {reason}") from error


def _requantize(source: str, target: str, quantization: str) -> int:
    import llama_cpp

    def end_with_parent() -> None:
        os.read(
            sys.stdin.fileno(), 1
        )  # a buffered read would hold a lock that Python needs at exit
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[quantization]
    params.allow_requantize = True
    return int(
        llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    )


if __name__ == "__main__":
    sys.exit(_requantize(*sys.argv[1:]))
