"""A library of NVML's shape, compiled from ``libnvidia_ml.c``, for the real binding to load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SOURCE = Path(__file__).parent / "libnvidia_ml.c"


def compile_nvml(folder: Path) -> Path:
    """Compile the library into ``folder``, by the name that programs look for; returns the folder."""
    subprocess.run(
        [
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-Wall",
            "-Werror",
            _SOURCE,
            "-o",
            folder / "libnvidia-ml.so.1",
        ],
        check=True,
        timeout=60,
    )
    return folder


def nvml_environment(folder: Path, fault: str = "") -> dict[str, str]:
    """An environment in which programs find the library; ``fault`` is one that it is to show."""
    return {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_NVML": fault,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
