"""Starts a bench in a process of its own.

Locust runs on gevent, which replaces Python's sockets and threads for a whole process, before anything else
is imported. The command line's process stays as it is.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys

from loadtest.options import BenchOptions


def run_bench(options: BenchOptions) -> int:
    """Run a load test and write its report; returns the exit status.

    0: done. 1: no request succeeded. 2: the server cannot be used; the reason has been printed.
    """
    process = subprocess.Popen([sys.executable, "-m", "loadtest"], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    # Through a pipe, as a command line can be read by every user of the machine and this holds a key.
    process.stdin.write(options.to_json())
    process.stdin.close()
    while True:
        # Ctrl-C reaches the bench too, which ends early and still writes its report.
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()
