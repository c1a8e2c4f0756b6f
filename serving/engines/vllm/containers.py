"""vLLM from a container image: the command line that runs it, bound to loopback, with the model's files in their places."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from serving.config import VllmModel
from serving.engines.vllm import container_guard
from serving.engines.vllm.command import MODULE
from serving.engines.vllm.environment import INSIDE

PORT = 8000
"""Where it listens within its container."""


def command(
    model: VllmModel,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    paths: Iterable[Path],
    *,
    port: int,
    gpus: tuple[str, ...] | None,
) -> list[str]:
    """What runs the image; the variables of ``environment`` are handed on by name, so their values are not shown."""
    assert model.image is not None
    words = [
        *(sys.executable, "-I", "-S", container_guard.__file__, model.container_runtime),
        *("--rm", "--init", "--pull=missing"),
        *("--publish", f"127.0.0.1:{port}:{PORT}"),
        # Its processes share tensors; Docker's own 64 MiB are too few.
        "--ipc=host",
        *("--entrypoint", "python3"),
    ]
    if gpus is None:
        words += ["--gpus", "all"]
    elif gpus:
        words += ["--gpus", f'"device={",".join(gpus)}"']
    for name in sorted(environment):
        words += ["--env", name]
    for folder in sorted({INSIDE, *_folders(paths)}):
        words += ["--volume", f"{folder}:{folder}:ro"]
    return [*words, model.image, "-m", MODULE, *arguments]


def _folders(paths: Iterable[Path]) -> Iterable[Path]:
    """The folders of the files, and those that links in them lead to, as in the Hub's cache."""
    for path in paths:
        yield path if path.is_dir() else path.parent
        if path.is_dir():
            yield from {each.resolve().parent for each in path.iterdir() if each.is_symlink()}
