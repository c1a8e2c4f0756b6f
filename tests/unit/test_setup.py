"""`make` builds for CPU or CUDA from what the machine has, and every version is pinned."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tools import setup
from tools.llama_build import Progress, SetupError, choose_build, pip_environment

ROOT = Path(__file__).parents[2]
CARD = "GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-0)"


def program(folder: Path, name: str, *, prints: str = "", status: int = 0) -> None:
    """An executable that the set-up can find and run."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{prints}'\nexit {status}\n")
    path.chmod(0o755)


def machine(path: Path, build: str | None = None) -> dict[str, str]:
    """The environment of a machine that has nothing but the programs in ``path``."""
    return {"PATH": str(path)} | ({} if build is None else {"RIGSERVE_BUILD": build})


def test_without_a_driver_it_builds_for_cpu_and_says_how_to_override(tmp_path: Path) -> None:
    program(tmp_path, "nvcc")  # a compiler alone is no card
    build = choose_build(machine(tmp_path), ())
    assert build.kind == "cpu"
    assert build.reason == (
        "no NVIDIA driver found: building for CPU (override: make serve RIGSERVE_BUILD=cuda)"
    )


@pytest.mark.parametrize(("prints", "status"), [("", 9), ("No devices found.", 0)])
def test_a_driver_that_sees_no_card_is_none(tmp_path: Path, prints: str, status: int) -> None:
    program(tmp_path, "nvidia-smi", prints=prints, status=status)
    program(tmp_path, "nvcc")
    assert choose_build(machine(tmp_path), ()).kind == "cpu"


def test_a_driver_and_a_compiler_give_a_cuda_build(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", prints=CARD)
    program(tmp_path, "nvcc")
    build = choose_build(machine(tmp_path), ())
    assert (build.kind, build.nvcc) == ("cuda", tmp_path / "nvcc")


def test_the_compiler_is_found_where_cuda_puts_it(tmp_path: Path) -> None:
    program(tmp_path / "bin", "nvidia-smi", prints=CARD)
    program(tmp_path / "cuda", "nvcc")
    build = choose_build(machine(tmp_path / "bin"), [tmp_path / "cuda"])
    assert (build.kind, build.nvcc) == ("cuda", tmp_path / "cuda" / "nvcc")


def test_a_driver_alone_asks_for_a_published_wheel(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", prints=CARD)
    assert choose_build(machine(tmp_path), ()).kind == "cuda-wheel"


def test_the_override_wins_over_what_is_found(tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", prints=CARD)
    program(tmp_path, "nvcc")
    assert choose_build(machine(tmp_path, "cpu"), ()).kind == "cpu"
    (tmp_path / "nvidia-smi").unlink()
    assert choose_build(machine(tmp_path, "cuda"), ()).kind == "cuda"
    assert choose_build(machine(tmp_path, ""), ()).kind == "cpu"  # empty is as unset


def test_cuda_without_its_compiler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="RIGSERVE_BUILD=cuda needs CUDA's compiler nvcc"):
        choose_build(machine(tmp_path, "cuda"), ())


def test_an_unknown_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="'gpu'; expected auto, cpu or cuda"):
        choose_build(machine(tmp_path, "gpu"), ())


def test_without_a_c_compiler_the_error_names_the_packages(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "import os; from tools.llama_build import _require_compilers as r; r(os.environ)"],
        env=machine(tmp_path), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode != 0
    for wanted in ("apt install g++", "dnf install gcc-c++", "pacman -S gcc"):
        assert wanted in finished.stderr


def test_an_interrupted_build_leaves_no_compiler_running(tmp_path: Path) -> None:
    compiler = "for _ in $(seq 400); do echo >> alive; sleep 0.05; done"
    code = (
        "import os, signal; from pathlib import Path; from tools.llama_build import _run_with_progress\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        f"_run_with_progress(['sh', '-c', '({compiler}) & wait'], os.environ, Path('log'))"
    )
    build = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    alive = tmp_path / "alive"
    deadline = time.monotonic() + 10
    while not alive.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    build.send_signal(signal.SIGTERM)
    build.wait(timeout=10)
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size


def test_progress_is_a_line_for_every_tenth_when_not_on_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress(terminal=False)
    for step in range(1, 101):
        progress.show(step, 100)
    progress.end()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1] == "  compiling: 100% (100 of 100)"


def test_progress_is_one_line_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(terminal=True)
    for step in range(1, 101):
        progress.show(step, 100)
    progress.end()
    printed = capsys.readouterr().out
    assert printed.count("\r") == 100
    assert printed.count("\n") == 1


def test_pip_gets_the_pins_also_from_a_folder_with_a_space(tmp_path: Path) -> None:
    environment = pip_environment({}, tmp_path / "a folder" / "constraints.txt")
    assert " " not in environment["PIP_CONSTRAINT"]  # pip splits this variable at spaces


def test_constraints_are_pins_without_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []


def test_constraints_pin_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = itertools.chain(
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        project["build-system"]["requires"],
        [setup.MODEL_PACKAGE, setup.TEST_MODEL_PACKAGE],
    )
    names = {setup.normalized(re.split(r"[^\w.-]", requirement)[0]) for requirement in wanted}
    assert names - {"rigserve"} <= setup.pinned_versions(ROOT / "constraints.txt").keys()
