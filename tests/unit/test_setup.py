"""The set-up script decides for CPU or CUDA from what the machine has."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rigserve_setup", ROOT / "tools" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tools(folder: Path, **exit_codes: int) -> str:
    for name, code in exit_codes.items():
        program = folder / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        program.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ({}, "cpu"),
        ({"nvcc": 0}, "cpu"),  # a compiler alone is no card
        ({"nvidia_smi": 9, "nvcc": 0}, "cpu"),  # a driver that does not answer is none
        ({"nvidia_smi": 0, "nvcc": 0}, "cuda"),
        ({"nvidia_smi": 0}, "cuda-wheel"),
    ],
)
def test_the_build_suits_the_machine(
    setup: ModuleType, tmp_path: Path, found: dict[str, int], kind: str
) -> None:
    build = setup.choose_build("auto", tools(tmp_path, **found))
    assert build.kind == kind
    assert build.reason


@pytest.mark.parametrize("wanted", ["cpu", "cuda"])
def test_the_build_can_be_overridden(setup: ModuleType, tmp_path: Path, wanted: str) -> None:
    assert setup.choose_build(wanted, str(tmp_path)).kind == wanted


def test_an_unknown_override_is_refused(setup: ModuleType) -> None:
    with pytest.raises(setup.SetupError, match="auto, cpu or cuda"):
        setup.choose_build("gpu", "")


def test_constraints_pin_every_requirement_and_hold_no_addresses() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line) for line in lines)
    pinned = {re.sub(r"[._]", "-", line.split("==")[0].lower()) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    for requirement in wanted:
        name = re.split(r"[\[<>=~ ]", requirement)[0].lower()
        assert name == "rigserve" or name in pinned, requirement
