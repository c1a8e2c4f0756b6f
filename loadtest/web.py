"""Locust's web UI, with what it does not know about LLMs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from loadtest.crowd import Crowd

WEB_HOST = "127.0.0.1"
WEB_PORT = 8089


@contextmanager
def serve_web(crowd: Crowd, console: Console) -> Iterator[None]:
    """Serve it until the block ends."""
    web = crowd.environment.create_web_ui(WEB_HOST, WEB_PORT)
    console.print(f"Locust's web UI: http://{WEB_HOST}:{WEB_PORT}; Ctrl-C ends and reports")
    try:
        yield
    finally:
        web.stop()
