"""Clients in environments of their own: made once, cached beside the project's, and run."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

CLIENTS = Path(__file__).parent / "clients"
_CACHE = Path(sys.prefix) / "clients"
_INSTALL_SECONDS = 600.0
_RUN_SECONDS = 120.0


def run_python(script: str, requirements: str, base_url: str) -> Any:
    """What a Python client tells of a server. Skips where its packages cannot be had."""

    def install(folder: Path) -> list[list[str]]:
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "-r"]
        return [[sys.executable, "-m", "venv", str(folder)], [*pip, str(CLIENTS / requirements)]]

    folder = _environment(CLIENTS / requirements, install)
    return _told([str(folder / "bin" / "python"), str(CLIENTS / script), base_url])


def run_node(script: str, base_url: str) -> Any:
    """What a JavaScript client tells of a server. Skips where there is no Node, or its packages cannot be had."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("NOT TESTED: the JavaScript client needs node and npm")

    def install(folder: Path) -> list[list[str]]:
        folder.mkdir(parents=True)
        shutil.copy(CLIENTS / "package.json", folder)
        return [
            [
                npm,
                "install",
                "--prefix",
                str(folder),
                "--no-package-lock",
                "--no-audit",
                "--no-fund",
            ]
        ]

    folder = _environment(CLIENTS / "package.json", install)
    # Node looks for packages beside the script.
    return _told([node, str(shutil.copy(CLIENTS / script, folder)), base_url])


def _environment(definition: Path, install: Callable[[Path], list[list[str]]]) -> Path:
    """The environment that a file defines, made if need be; other processes wait for it."""
    digest = hashlib.sha256(definition.read_bytes() + sys.version.encode()).hexdigest()[:16]
    folder = _CACHE / f"{definition.stem}-{digest}"
    made = folder / "made"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if made.exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        for command in install(folder):
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=_INSTALL_SECONDS
            )
            if done.returncode:
                pytest.skip(
                    f"NOT TESTED: {definition.name} cannot be installed: {done.stderr[-500:]}"
                )
        made.touch()
    return folder


def _told(command: list[str]) -> Any:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=_RUN_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
