"""Checks of llama.cpp as it is installed: asked in a process of its own, which a broken build may end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from serving.doctor.finding import Finding, ok, problem, unchecked, warning
from serving.hardware.cpu import Cpu

_CHECK = "llama.cpp"
_TIMEOUT_SECONDS = 60
_QUESTION = """
import json, llama_cpp
print(json.dumps({
    "version": llama_cpp.__version__,
    "has_gpu": bool(llama_cpp.llama_supports_gpu_offload()),
    "features": llama_cpp.llama_print_system_info().decode(),
}))
"""
_REBUILD = "build it on this machine: rm -r .venv && make setup"
# What llama.cpp calls the instruction sets that a processor may have.
_FEATURES: Mapping[str, str] = {
    "AVX2": "AVX2",
    "FMA": "FMA",
    "F16C": "F16C",
    "AVX-512": "AVX512",
    "AVX-VNNI": "AVX_VNNI",
    "AVX512-VNNI": "AVX512_VNNI",
    "AVX512-BF16": "AVX512_BF16",
    "AMX-INT8": "AMX_INT8",
    "NEON": "NEON",
    "DOTPROD": "DOTPROD",
    "I8MM": "MATMUL_INT8",
    "SVE": "SVE",
}


@dataclass(frozen=True, slots=True)
class Build:
    """An installed llama.cpp: ``features`` are the instruction sets it was compiled for, in its words."""

    version: str
    has_gpu: bool
    features: frozenset[str]


class NoBuild(Exception):
    """llama.cpp does not answer; the message says why."""


def installed_build(python: str = sys.executable) -> Build:
    """Ask the llama.cpp of a Python environment; raises :class:`NoBuild`."""
    try:
        result = subprocess.run(
            [python, "-c", _QUESTION],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoBuild(str(error)) from error
    if result.returncode < 0:
        raise NoBuild(
            f"it was ended by signal {-result.returncode}, as by an instruction that the processor lacks"
        )
    try:
        told = json.loads(result.stdout)
    except ValueError as error:
        lines = result.stderr.strip().splitlines()
        raise NoBuild(lines[-1] if lines else "it says nothing") from error
    features = (part.partition("=") for part in told["features"].replace(":", "|").split("|"))
    return Build(
        told["version"],
        told["has_gpu"],
        frozenset(name.strip() for name, _, value in features if value.strip() == "1"),
    )


def check_build(processor: Cpu, gpu_vendors: Sequence[str]) -> Iterator[Finding]:
    """Whether it loads, and uses what the machine has."""
    try:
        build = installed_build()
    except NoBuild as error:
        yield problem(_CHECK, f"it cannot be loaded: {error}", _REBUILD)
        return
    backend = "for a GPU" if build.has_gpu else "for the processor"
    says = f"llama-cpp-python {build.version}, built {backend}"
    if gpu_vendors and not build.has_gpu:
        yield warning(
            _CHECK,
            f"{says}, though there is a card of {' and '.join(gpu_vendors)}'s: it is not used",
            "for NVIDIA: rm -r .venv && make setup RIGSERVE_BUILD=cuda; "
            "for others: engine: llama_server with a build that has their backend",
        )
    elif build.has_gpu and not gpu_vendors:
        yield warning(_CHECK, f"{says}, but there is no card that it could use", "see GPU driver")
    else:
        yield ok(_CHECK, says)
    missing = [
        name
        for name in processor.instruction_sets
        if name in _FEATURES and _FEATURES[name] not in build.features
    ]
    if not build.features:
        yield unchecked(_CHECK, "it does not tell for which instructions it was compiled")
    elif missing:
        yield warning(
            _CHECK,
            f"it was compiled without {', '.join(missing)}, which this processor has: it is slower than need be",
            _REBUILD,
        )
