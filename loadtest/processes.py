"""Worker processes of this machine, and the leash that ends what nobody waits for any more."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gevent
from gevent.event import Event
from gevent.select import select

from loadtest.options import Join

_STDIN = 0


class Leash:
    """What comes down the standard input from the process that started this one, after the options.

    ``end`` is set by a line: no more requests. ``abandon`` by a second one, or with ``end`` when the other
    process is gone: no more waiting either.
    """

    def __init__(self) -> None:
        self.end, self.abandon = Event(), Event()
        gevent.spawn(self._watch)

    def _watch(self) -> None:
        while not self.abandon.is_set():
            select([_STDIN], [], [])
            said = os.read(_STDIN, 1024)
            if not said or self.end.is_set() or said.count(b"\n") > 1:
                self.abandon.set()
            self.end.set()


@contextmanager
def local_workers(
    count: int, host: str, port: int, api_key: str | None
) -> Iterator[Callable[[], int]]:
    """So many processes that join the bench at an address, until the block ends or this process does.

    Yields what counts those that have died.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "loadtest", "--worker"],
                stdin=subprocess.PIPE,
                text=True,
                process_group=0,
            )
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(Join(host, port, api_key).to_json() + "\n")
            process.stdin.flush()
        yield lambda: sum(process.poll() is not None for process in processes)
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            process.wait()


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
