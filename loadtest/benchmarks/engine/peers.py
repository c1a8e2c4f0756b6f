"""Builds the peers from the source package of the very llama-cpp-python that is installed.

    python -m loadtest.benchmarks.engine.peers

llama-server and llama-batched-bench are compiled from the llama.cpp inside it, as the library was: the same
commit, processor and flags. The package's example server is a file beside it. Everything is kept, so that a
second run has nothing to do.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

_PACKAGE = "llama-cpp-python"
_PROGRAMS = ("llama-server", "llama-batched-bench")
_LEAVE_OUT = ("LLAMA_CURL", "LLAMA_OPENSSL", "LLAMA_BUILD_UI", "LLAMA_BUILD_TESTS",
              "LLAMA_BUILD_EXAMPLES")  # fmt: skip
_LOG_TAIL_LINES = 30
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rigserve"


class PeersError(Exception):
    """A peer cannot be built or found; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Peers:
    """A folder with the programs and the unpacked source package of the installed version."""

    folder: Path = CACHE / "peers" / version(_PACKAGE)

    @property
    def source(self) -> Path:
        """The unpacked package."""
        return self.folder / f"{_PACKAGE.replace('-', '_')}-{version(_PACKAGE)}"

    @property
    def example_server(self) -> Path:
        """The package's server with continuous batching, one Python file."""
        return self.source / "examples" / "server" / "server.py"

    @property
    def environment(self) -> dict[str, str]:
        """What the programs need to find their libraries."""
        return {"LD_LIBRARY_PATH": str(self.folder / "build" / "bin")}

    def program(self, name: str) -> Path:
        """A compiled program."""
        return self.folder / "build" / "bin" / name

    def require(self) -> Peers:
        """Themselves, if nothing is missing; raises :class:`PeersError`."""
        for path in (*map(self.program, _PROGRAMS), self.example_server):
            if not path.exists():
                raise PeersError(f"there is no {path}; build the peers with: make bench-peers")
        return self


def build(peers: Peers) -> Peers:
    """Build what is missing; raises :class:`PeersError`."""
    peers.folder.mkdir(parents=True, exist_ok=True)
    if not peers.source.exists():
        _unpack(peers.folder, peers.source)
    if not all(peers.program(name).exists() for name in _PROGRAMS):
        _compile(peers.source / "vendor" / "llama.cpp", peers.folder)
    return peers.require()


def _unpack(folder: Path, target: Path) -> None:
    requirement = f"{_PACKAGE}=={version(_PACKAGE)}"
    print(f"fetching the source package of {requirement}", flush=True)
    _run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE,
         "--dest", str(folder), requirement],
        folder / "download.log",
    )  # fmt: skip
    archive = next(folder.glob("*.tar.gz"))
    with tempfile.TemporaryDirectory(dir=folder) as unpacking, tarfile.open(archive) as tar:
        tar.extractall(unpacking, filter="data")
        (Path(unpacking) / target.name).rename(target)
    archive.unlink()


def _compile(source: Path, folder: Path) -> None:
    if shutil.which("cmake") is None:
        raise PeersError("cmake is not on PATH; install it, for example: pip install cmake")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"compiling {' and '.join(_PROGRAMS)} on {cores} cores, once: about 7 minutes on 2")
    options = ["CMAKE_BUILD_TYPE=Release", *(f"{name}=OFF" for name in _LEAVE_OUT)]
    if _library_is_cuda():
        options.append("GGML_CUDA=ON")
    build_folder = folder / "build"
    _run(
        ["cmake", "-S", str(source), "-B", str(build_folder), *(f"-D{each}" for each in options),
         # What the user had the library built with comes last, so that it wins.
         *shlex.split(os.environ.get("CMAKE_ARGS", ""))],
        folder / "configure.log",
    )  # fmt: skip
    _run(
        ["cmake", "--build", str(build_folder), "--parallel", str(cores), "--target", *_PROGRAMS],
        folder / "build.log",
    )


def _library_is_cuda() -> bool:
    spec = importlib.util.find_spec("llama_cpp")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise PeersError(f"{_PACKAGE} is not installed; run: make setup")
    return any(Path(spec.submodule_search_locations[0]).glob("lib/*ggml-cuda*"))


def _run(command: Sequence[str], log: Path) -> None:
    """Run to the end, showing a line for every tenth; raises :class:`PeersError` with the last words."""
    tenths = 0
    lines: list[str] = []
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert process.stdout is not None
        for line in process.stdout:
            output.write(line)
            lines = [*lines[1 - _LOG_TAIL_LINES :], line]
            step = re.match(r"\[ *(\d+)%\]", line)
            if step and int(step[1]) // 10 > tenths:
                tenths = int(step[1]) // 10
                print(f"  compiling: {tenths * 10}%", flush=True)
    if process.wait() != 0:
        raise PeersError(f"{''.join(lines)}\n{command[0]} failed; the whole log: {log}")


def main() -> int:
    """Build what is missing, saying where it is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", type=Path, default=Peers().folder, help="the folder")
    try:
        peers = build(Peers(parser.parse_args().peers.resolve()))
    except (PeersError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"the peers are ready in {peers.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
