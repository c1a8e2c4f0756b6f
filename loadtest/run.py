"""Starts a bench in a process of its own, and keeps it on a leash.

Locust runs on gevent, which replaces Python's sockets and threads for a whole process, before anything else
is imported. The command line's process stays as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys

from loadtest.options import BenchOptions, Join


def run_bench(options: BenchOptions) -> int:
    """Run a load test and write its report; returns the exit status.

    0: done. 1: no request succeeded. 2: the options or the server cannot be used; the reason has been
    printed. 3: a condition of ``slo`` or ``baseline`` does not hold. 130: interrupted before the load
    began. Ctrl-C ends the load early and still writes the report; a second one does not wait for requests
    in flight. If this process is killed, the load ends too.
    """
    return _run_leashed([], options.to_json())


def run_worker(join: Join) -> int:
    """Send load for the bench at another address until that ends; returns the exit status."""
    return _run_leashed(["--worker"], join.to_json())


def _run_leashed(arguments: list[str], line: str) -> int:
    if importlib.util.find_spec("locust") is None:
        print(
            "error: the load test needs Locust; install it with: pip install 'rigserve[load]'",
            file=sys.stderr,
        )
        return 2
    # In a process group of its own, or Ctrl-C in a terminal would reach it twice. Its standard input is the
    # leash: the options (a command line would show the API key to every user of the machine), then a line
    # for each Ctrl-C; its end means that this process is gone.
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest", *arguments],
        stdin=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdin is not None
    leash = process.stdin
    while True:
        try:
            with contextlib.suppress(BrokenPipeError):
                leash.write(line + "\n")
                leash.flush()
            return process.wait()
        except KeyboardInterrupt:
            line = "stop"
