"""What the supervisor needs to know to run an engine, and who says so for each kind of engine."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Files:
    """What a model is served from."""

    model: Path
    projector: Path | None = None
    draft_model: Path | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """One engine process to be: its command line, and environment variables beside the inherited ones."""

    command: list[str]
    environment: dict[str, str]


class Launcher(Protocol):
    """How engines of one kind are started."""

    def prepare(self, model: ModelConfig) -> Files:
        """Fetch and convert the model's files; may take long. Raises ``ModelError``."""

    def launch(self, model: ModelConfig, files: Files, port: int, api_key: str) -> Launch:
        """The process that serves ``files`` on a loopback port to holders of ``api_key``."""


def free_port() -> int:
    """A loopback TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
