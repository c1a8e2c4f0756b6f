"""What docs/operations.md shows an operator runs as it stands there, but for the port."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from serving.config import Config, load_config
from tests.processes import RigServer, write_config

GUIDE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
# What is indented by four.
BLOCKS = [textwrap.dedent(b) for b in re.findall(r"(?m)(?:^    .*\n)+", GUIDE)]
COMMANDS = [
    command
    for block in BLOCKS
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith(("rigserve ", "curl "))
]
SETTINGS = [
    block
    for block in BLOCKS
    if re.match(r"[a-z]+:", block) and yaml.safe_load(block).keys() <= Config.model_fields.keys()
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """Its config is rig.yaml, as in the guide; beside it is a `rigserve` to call."""
    folder = tmp_path_factory.mktemp("rig")
    program = folder / "rigserve"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m serving "$@"\n')
    program.chmod(0o755)
    with RigServer(write_config(folder, cache_dir, max_sequences=2)) as server:
        server.wait_until_ready()
        yield server


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 12
    assert len(SETTINGS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(rig: RigServer, command: str) -> None:
    """In the order of the guide."""
    if command.startswith("curl ") and shutil.which("curl") is None:
        pytest.skip("there is no curl")
    folder = rig.config_path.parent
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "RIGSERVE_SERVER": rig.base_url,
    }
    follows = " -f " in command
    line = command.replace("localhost:8000", rig.base_url.removeprefix("http://"))
    done = subprocess.run(
        ["timeout", "5" if follows else "60", "bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (124 if follows else 0), done.stdout + done.stderr
    assert done.stdout.strip()
    assert '{"error"' not in done.stdout
    assert not done.stderr or command.startswith("curl ")


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings_are_settings(tmp_path: Path, settings: str) -> None:
    base = {"models": [{"name": "m", "source": "hf://org/repo/file.gguf"}]}
    path = tmp_path / "rig.yaml"
    path.write_text(
        yaml.safe_dump(base | yaml.safe_load(re.sub("ORG/(REPO|OTHER)", "org/repo", settings)))
    )
    load_config(path)
