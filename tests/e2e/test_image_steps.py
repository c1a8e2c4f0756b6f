"""The very steps of the CPU image, in a folder of their own: copied, set up, and started as the image is.

llama-cpp-python is taken from the tests' environment, as compiling it takes minutes. Everything is compiled, too, with
RIGSERVE_IMAGE_STEPS=full; without it this is left out of everyday runs.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml

from serving.engines.launch import free_port
from tests.processes import Program, wait_for
from tools.llama_build import PACKAGE
from tools.setup import pinned_versions

ROOT = Path(__file__).parents[2]
STEPS = os.environ.get("RIGSERVE_IMAGE_STEPS", "")

pytestmark = [
    pytest.mark.skipif(STEPS not in ("full", "short"), reason="takes minutes: make image-steps"),
    pytest.mark.timeout(1500),
]


def instructions() -> list[list[tuple[str, str]]]:
    """The Dockerfile's stages, as (instruction, rest)."""
    text = (ROOT / "docker" / "cpu.Dockerfile").read_text()
    text = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ")
    stages: list[list[tuple[str, str]]] = [[]]
    for line in filter(str.strip, text.splitlines()):
        name, rest = line.split(None, 1)
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest.strip()))
    return stages


def copy(words: str, context: Path, folder: Path) -> None:
    """``COPY`` from the context, of which .dockerignore lets nothing else in."""
    *sources, target = shlex.split(words)
    allowed = (context / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert f"!{source}" in allowed
        if (context / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(context / source, folder / target, ignore=ignore)
        else:
            shutil.copy(context / source, folder / target)


def seed(folder: Path) -> None:
    """An environment in which set-up finds llama-cpp-python built."""
    venv.create(folder / ".venv", with_pip=True, symlinks=True)
    there = next((folder / ".venv").glob("lib/python*/site-packages"))
    built = distribution(PACKAGE)
    for name in {Path(file).parts[0] for file in built.files or ()} - {"..", "bin"}:
        source = Path(str(built.locate_file(name)))
        if source.is_dir():
            shutil.copytree(source, there / name, dirs_exist_ok=True)
    version = pinned_versions(ROOT / "constraints.txt")[PACKAGE]
    state = {"folder": str(folder), "llama": f"{version} cpu", "requirements": "", "dev": False}
    (folder / ".venv" / "rigserve-setup.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the first stage leaves in /opt/rigserve."""
    _, build, _ = instructions()
    folder = tmp_path_factory.mktemp("image") / "opt/rigserve"
    folder.mkdir(parents=True)
    if STEPS != "full":
        seed(folder)
    environment = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    python = Path(sys.executable).resolve().parent
    environment["PATH"] = f"{python}:{environment['PATH']}"
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    for name, rest in build:
        if name == "ARG":
            variable, _, value = rest.partition("=")
            environment[variable] = value
        elif name == "COPY":
            copy(rest, ROOT, folder)
        elif name == "RUN" and not rest.startswith("apt-get"):
            done = subprocess.run(
                ["sh", "-c", rest],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout
    yield folder
    shutil.rmtree(folder)


def test_what_was_built_serves_as_the_image_starts_it(
    built: Path, tmp_path: Path, cache_dir: Path
) -> None:
    _, _, final = instructions()
    words = {name: rest for name, rest in final if name in ("ENTRYPOINT", "CMD", "HEALTHCHECK")}
    settings = yaml.safe_load(
        re.sub(r"\$\{\w+:-(.*?)\}", r"\1", (ROOT / "docker" / "rig.yaml").read_text())
    )
    port = free_port()
    settings["server"] |= {"host": "127.0.0.1", "port": port}
    settings["storage"] = {"cache_dir": str(cache_dir), "data_dir": str(tmp_path / "data")}
    config = tmp_path / "rig.yaml"
    config.write_text(yaml.safe_dump(settings))
    program = str(built / ".venv/bin" / json.loads(words["ENTRYPOINT"])[0])
    command = [program, *json.loads(words["CMD"])]
    assert command[-1] == "/etc/rigserve/rig.yaml"
    command[-1] = str(config)
    health = words["HEALTHCHECK"].partition("CMD ")[2].replace(":8000/", f":{port}/")
    # Nothing of the tests' own environment helps.
    environment = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
    with Program(command, f"http://127.0.0.1:{port}", environment) as server:
        wait_for(lambda: server.answers("/ready"), "it is ready", 120)
        subprocess.run([sys.executable, *json.loads(health)[1:]], check=True, timeout=30)
        assert server.stop() == 0
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [sys.executable, *json.loads(health)[1:]], check=True, timeout=30, capture_output=True
        )
    packages = {
        each["name"] for each in json.loads((built / "sbom.json").read_text())["components"]
    }
    assert {"fastapi", "rigserve"} <= packages
    # Locust brings pytest; what only developers need is not there.
    assert not {"mypy", "openai", "ruff"} & packages
