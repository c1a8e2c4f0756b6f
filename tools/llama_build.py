"""How llama-cpp-python is had on this machine: compiled for the CPU or for CUDA, or a published CUDA wheel."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PACKAGE = "llama-cpp-python"
# What leaves out the parts of llama.cpp that are not used.
CMAKE_INCLUDE = Path(__file__).resolve().parent / "llama.cmake"
# Where CUDA's compiler is installed when it is not on PATH.
CUDA_FOLDERS = (Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin"))
# Wheels that llama-cpp-python's project publishes, for a machine with a driver but no CUDA compiler.
CUDA_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"
CUDA_WHEEL_VERSIONS = ((13, 2), (13, 0), (12, 5), (12, 4), (12, 3), (12, 2), (12, 1), (11, 8))
_PROBE_TIMEOUT_SECONDS = 5
_DRIVER_TIMEOUT_SECONDS = 20
_LOG_TAIL_LINES = 30
_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")


class SetupError(Exception):
    """Set-up cannot go on; the message says what to install or change."""


@dataclass(frozen=True)
class Build:
    """What to build, why (a line for the user), and with which CUDA compiler."""

    kind: Literal["cpu", "cuda", "cuda-wheel"]
    reason: str
    nvcc: Path | None = None


def choose_build(
    environment: Mapping[str, str], cuda_folders: Sequence[Path] = CUDA_FOLDERS
) -> Build:
    """Decide from RIGSERVE_BUILD and from what is found on PATH.

    Raises :class:`SetupError` for an unknown RIGSERVE_BUILD, and for cuda where there is no nvcc.
    """
    override = environment.get("RIGSERVE_BUILD") or "auto"
    if override not in ("auto", "cpu", "cuda"):
        raise SetupError(f"RIGSERVE_BUILD is {override!r}; expected auto, cpu or cuda")
    if override == "cpu":
        return Build("cpu", "building for CPU, as RIGSERVE_BUILD says")
    path = environment.get("PATH", "")
    nvcc = _find_nvcc(path, cuda_folders)
    if override == "cuda":
        if nvcc is None:
            raise SetupError(
                "RIGSERVE_BUILD=cuda needs CUDA's compiler nvcc, which is neither on PATH nor in "
                f"{' or '.join(map(str, cuda_folders))}; install the CUDA toolkit"
            )
        return Build("cuda", f"building for CUDA with {nvcc}, as RIGSERVE_BUILD says", nvcc)
    if not _driver_answers(path):
        return Build(
            "cpu",
            "no NVIDIA driver found: building for CPU (override: make serve RIGSERVE_BUILD=cuda)",
        )
    if nvcc is None:
        return Build(
            "cuda-wheel",
            "NVIDIA driver found, but no nvcc: looking for a published CUDA wheel "
            "(override: make serve RIGSERVE_BUILD=cpu)",
        )
    return Build(
        "cuda",
        f"NVIDIA driver and {nvcc} found: building for CUDA "
        "(override: make serve RIGSERVE_BUILD=cpu)",
        nvcc,
    )


def install(python: Path, build: Build, version: str, constraints: Path, log: Path) -> None:
    """Install this ``version`` into the environment of ``python``, in place of any other build.

    Raises :class:`SetupError` when there is no compiler or the build fails; ``log`` holds pip's output.
    """
    print(build.reason, flush=True)
    if build.kind == "cuda-wheel":
        missing = _install_cuda_wheel(python, version, constraints)
        if missing is None:
            return
        print(f"{missing}: building for CPU instead (for CUDA, install nvcc)", flush=True)
    _compile(python, build, version, constraints, log)


def pip_environment(environment: Mapping[str, str], constraints: Path) -> dict[str, str]:
    """``environment`` with the pins in force for pip, and for the build tools that it fetches."""
    # Older pips hand PIP_CONSTRAINT down to the build environments they make; newer ones want the other.
    return {
        **environment,
        "PIP_CONSTRAINT": constraints.as_uri(),
        "PIP_BUILD_CONSTRAINT": constraints.as_uri(),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def _driver_answers(path: str) -> bool:
    """Whether an NVIDIA driver is loaded and sees a card."""
    command = shutil.which("nvidia-smi", path=path)
    if command is None:
        return False
    try:
        listing = subprocess.run(
            [command, "-L"],
            capture_output=True, text=True, check=False, timeout=_DRIVER_TIMEOUT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and listing.stdout.startswith("GPU ")


def _find_nvcc(path: str, cuda_folders: Sequence[Path]) -> Path | None:
    found = shutil.which("nvcc", path=os.pathsep.join([path, *map(str, cuda_folders)]))
    return Path(found) if found else None


def _install_cuda_wheel(python: Path, version: str, constraints: Path) -> str | None:
    """Install the published wheel that suits the driver; what was missing if none can be had."""
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", smi)
    newest = (int(found[1]), int(found[2])) if found else (0, 0)
    for major, minor in (each for each in CUDA_WHEEL_VERSIONS if each <= newest):
        index = f"{CUDA_WHEELS}/cu{major}{minor}/"
        try:
            urllib.request.urlopen(index, timeout=_PROBE_TIMEOUT_SECONDS).close()  # noqa: S310 (an https constant)
        except urllib.error.HTTPError:
            continue
        except OSError:
            return f"{CUDA_WHEELS} cannot be reached"
        command: list[str | Path] = [
            *(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-cache-dir"),
            *("--only-binary", PACKAGE, "--extra-index-url", index, f"{PACKAGE}=={version}"),
        ]
        environment = pip_environment(os.environ, constraints)
        if not _succeeds(command, environment):
            continue
        check = "import llama_cpp; assert llama_cpp.llama_supports_gpu_offload()"
        if not _succeeds([python, "-c", check], environment):
            return (
                f"the wheel for CUDA {major}.{minor} needs CUDA's libraries, which a driver lacks"
            )
        print(f"installed the published wheel for CUDA {major}.{minor}", flush=True)
        return None
    return f"no published CUDA wheel of {PACKAGE} {version} fits this machine"


def _succeeds(command: Sequence[str | Path], environment: Mapping[str, str]) -> bool:
    return (
        subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    )


def _compile(python: Path, build: Build, version: str, constraints: Path, log: Path) -> None:
    """Compile from the source package, for this very processor, showing progress."""
    _require_compilers(os.environ)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"compiling {PACKAGE} {version} on {cores} cores, once: about 5 minutes on 2 "
        f"(CUDA: longer); log: {log}",
        flush=True,
    )
    cmake_args = [f"-DCMAKE_PROJECT_INCLUDE={CMAKE_INCLUDE}"]
    environment = pip_environment(os.environ, constraints)
    environment["CMAKE_BUILD_PARALLEL_LEVEL"] = str(cores)
    if build.nvcc is not None:
        cmake_args.append("-DGGML_CUDA=on")
        environment["CUDACXX"] = str(build.nvcc)
    # The user's own arguments come last, so that they win.
    environment["CMAKE_ARGS"] = f"{shlex.join(cmake_args)} {os.environ.get('CMAKE_ARGS', '')}"
    command: list[str | Path] = [
        *(python, "-m", "pip", "install", "--verbose", "--force-reinstall"),
        # A cached wheel may be another build, or another processor's.
        *("--no-cache-dir", "--no-binary", PACKAGE, f"{PACKAGE}=={version}"),
    ]
    started = time.monotonic()
    if _run_with_progress(command, environment, log) != 0:
        text = log.read_text(errors="replace")
        print(*text.splitlines()[-_LOG_TAIL_LINES:], sep="\n", file=sys.stderr)
        raise SetupError(f"compiling {PACKAGE} failed; the whole log: {log}\n{_hint(text, build)}")
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)


def _require_compilers(environment: Mapping[str, str]) -> None:
    """Raise :class:`SetupError` unless CMake will find a C and a C++ compiler."""
    path = environment.get("PATH", "")
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        chosen = environment.get(variable)
        candidates = shlex.split(chosen)[:1] if chosen else names
        if not any(shutil.which(name, path=path) for name in candidates):
            sought = f"{variable}={chosen}" if chosen else " or ".join(names)
            raise SetupError(
                f"no C++ compiler found ({sought} is not on PATH); install one: "
                "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), "
                "pacman -S gcc (Arch), xcode-select --install (macOS)"
            )


def _hint(log: str, build: Build) -> str:
    """What usually mends a failed build, judged by its log."""
    if "Killed signal" in log:
        return "hint: memory ran out; close other programs and run make again"
    if "No space left on device" in log:
        return "hint: the disk is full; the build needs about 400 MB in the temporary folder"
    if "Could not find a version" in log or "ConnectionError" in log:
        return "hint: pip could not download a package; check the network, then run make again"
    if build.kind == "cuda":
        return (
            "hint: CUDA needs the whole toolkit (with cuBLAS) and a compiler that nvcc accepts; "
            "for CPU, run make again with RIGSERVE_BUILD=cpu"
        )
    return "hint: the first line with 'error' in the log says what failed; then run make again"


def _run_with_progress(
    command: Sequence[str | Path], environment: Mapping[str, str], log: Path
) -> int:
    """Run ``command``; its output goes to ``log``, and the compiler's steps to the screen."""
    progress = Progress(terminal=sys.stdout.isatty())
    process = subprocess.Popen(
        command,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,  # a process group, so that an interruption ends the compilers too
    )  # fmt: skip
    assert process.stdout is not None
    try:
        with log.open("w") as output:
            for line in process.stdout:
                output.write(line)
                if step := _STEP.search(line):
                    progress.show(int(step[1]), int(step[2]))
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        raise
    finally:
        progress.end()


class Progress:
    """A line that is rewritten on a terminal; elsewhere a new line for every tenth."""

    def __init__(self, *, terminal: bool) -> None:
        self._terminal = terminal
        self._tenths = 0
        self._shown = False

    def show(self, step: int, steps: int) -> None:
        """Report that ``step`` of ``steps`` is done."""
        text = f"  compiling: {step * 100 // steps}% ({step} of {steps})"
        tenths = step * 10 // steps
        if self._terminal:
            print(f"\r{text}", end="", flush=True)
            self._shown = True
        elif tenths > self._tenths:
            print(text, flush=True)
        self._tenths = tenths

    def end(self) -> None:
        """Finish the line."""
        if self._shown:
            print(flush=True)
