"""``python -m loadtest``: the processes that :func:`loadtest.run.run_bench` starts. Use `rigserve bench`."""

# ruff: noqa: E402 - gevent must come before everything that opens sockets.
from gevent import monkey

monkey.patch_all()

import sys

from loadtest.options import BenchOptions, Join
from loadtest.session import join, run

line = sys.stdin.readline()
if sys.argv[1:] == ["--worker"]:
    sys.exit(join(Join.from_json(line)))
sys.exit(run(BenchOptions.from_json(line)))
