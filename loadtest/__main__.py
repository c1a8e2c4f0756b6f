"""``python -m loadtest``: the process that :func:`loadtest.run.run_bench` starts. Use `rigserve bench`."""

# ruff: noqa: E402 - gevent must come before everything that opens sockets.
from gevent import monkey

monkey.patch_all()

import sys

from loadtest.options import BenchOptions
from loadtest.session import run

sys.exit(run(BenchOptions.from_json(sys.stdin.readline())))
