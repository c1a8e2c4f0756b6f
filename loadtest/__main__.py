"""``python -m loadtest``: runs the bench whose options are on stdin. Use `rigserve bench`."""

# ruff: noqa: E402 - gevent must come before everything that opens sockets.
from gevent import monkey

monkey.patch_all()

import sys

from loadtest.options import BenchOptions
from loadtest.session import run

sys.exit(run(BenchOptions.from_json(sys.stdin.read())))
