"""The list of an environment's packages, in the form that scanners read."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tools import sbom


def test_packages_are_named_as_scanners_look_them_up() -> None:
    # As in an image: by its path, with nothing of ours to import.
    command = [sys.executable, "-I", str(Path(sbom.__file__))]
    printed = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)]
    assert printed[0] == printed[1]
    told = json.loads(printed[0])
    assert (told["bomFormat"], told["specVersion"]) == ("CycloneDX", "1.5")
    by_name = {each["name"]: each for each in told["components"]}
    fastapi, llama = by_name["fastapi"], by_name["llama-cpp-python"]
    assert fastapi["purl"] == f"pkg:pypi/fastapi@{version('fastapi')}"
    assert llama["version"] == version("llama-cpp-python")
    assert len({each["bom-ref"] for each in told["components"]}) == len(told["components"])
