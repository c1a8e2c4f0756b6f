"""Starts a bench in a process of its own, and keeps it on a leash.

Locust runs on gevent, which replaces Python's sockets and threads for a whole process, before anything else
is imported. The command line's process stays as it is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys

from loadtest.options import BenchOptions


def run_bench(options: BenchOptions) -> int:
    """Run a load test and write its report; returns the exit status.

    0: done. 1: no request succeeded. 2: the options or the server cannot be used; the reason has been
    printed. 130: interrupted before the load began. Ctrl-C ends the load early and still writes the report;
    a second one does not wait for requests in flight. If this process is killed, the load ends too.
    """
    if problem := _problem(options):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    # In a process group of its own, or Ctrl-C in a terminal would reach it twice. Its standard input is the
    # leash: the options (a command line would show the API key to every user of the machine), then a line
    # for each Ctrl-C; its end means that this process is gone.
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest"], stdin=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdin is not None
    leash, line = process.stdin, options.to_json()
    while True:
        try:
            with contextlib.suppress(BrokenPipeError):
                leash.write(line + "\n")
                leash.flush()
            return process.wait()
        except KeyboardInterrupt:
            line = "stop"


def _problem(options: BenchOptions) -> str | None:
    if importlib.util.find_spec("locust") is None:
        return "the load test needs Locust; install it with: pip install 'rigserve[load]'"
    for name in ("users", "prompt_tokens", "output_tokens"):
        value = getattr(options, name)
        if value < 1:
            return f"--{name.replace('_', '-')} must be at least 1, not {value}"
    return None
