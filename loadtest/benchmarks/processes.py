"""Starts the servers that are compared, and never leaves one behind."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import aiohttp

_START_SECONDS = 120
_LOG_TAIL_BYTES = 2000


@contextmanager
def running(
    command: Sequence[str],
    ready_url: str,
    environment: Mapping[str, str] | None = None,
    *,
    start_seconds: float = _START_SECONDS,
) -> Iterator[int]:
    """Run a server until the block ends; yields its process group once ``ready_url`` answers 200.

    Raises ``RuntimeError`` when it does not start; such errors carry the server's last words as a note.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        try:
            if not asyncio.run(_becomes_ready(process, ready_url, start_seconds)):
                raise RuntimeError("the server did not start")
            yield process.pid
        except RuntimeError as error:
            log.seek(max(log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES, 0))
            last_words = log.read().decode(errors="replace")
            error.add_note(f"{shlex.join(command)} said last:\n{last_words}")
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                os.killpg(process.pid, signal.SIGCONT)  # a stopped process does not see the other
            process.wait()


async def _becomes_ready(process: subprocess.Popen[bytes], url: str, start_seconds: float) -> bool:
    deadline = time.monotonic() + start_seconds
    async with aiohttp.ClientSession() as session:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return True
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.2)
    return False


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
