"""The environments that `rigserve engines install vllm` has made: where they are, and which is in use.

``DATA_DIR/engines/vllm/FOLDER`` holds one, whole if there is a manifest in it, which is written last. ``current.json``
names the folder in use. So what was broken off is never taken for an environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from serving.folders import make_private
from serving.models.sources import ModelError

Build = Literal["cuda", "cpu"]
INSIDE = Path(__file__).parent / "inside"
"""What runs within vLLM's environment."""

_MANIFEST, _CURRENT = "rigserve.json", "current.json"


@dataclass(frozen=True, slots=True)
class Environment:
    """An installed vLLM, whole: it was imported and has served before it was written down."""

    folder: Path
    version: str
    build: Build
    python_version: str
    installed_unix: float

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


class Environments:
    """All that are below a data folder."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self.folder = data_dir / "engines" / "vllm"

    def make_folder(self) -> None:
        """Make the folder of all, if need be; the data folder is its owner's only, whoever makes it first."""
        make_private(self._data_dir)
        self.folder.mkdir(parents=True, exist_ok=True)

    def all(self) -> Iterator[Environment]:
        """Those that are whole, in the order of their folders' names."""
        for manifest in sorted(self.folder.glob(f"*/{_MANIFEST}")):
            environment = _read(manifest)
            if environment is not None:
                yield environment

    @property
    def current(self) -> Environment | None:
        """The one in use; None if there is none, or if it is not there any more."""
        try:
            named = json.loads((self.folder / _CURRENT).read_text(encoding="utf-8"))["folder"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return _read(self.folder / str(named) / _MANIFEST)

    def write(self, environment: Environment) -> None:
        """Note that an environment is whole."""
        told = asdict(environment) | {"folder": environment.folder.name}
        _replace(environment.folder / _MANIFEST, told)

    def use(self, environment: Environment) -> None:
        """Have new engines start from this one."""
        _replace(self.folder / _CURRENT, {"folder": environment.folder.name})

    def unfinished(self) -> Iterator[Path]:
        """Folders that an install has left, or a removal."""
        if self.folder.is_dir():
            for each in sorted(self.folder.iterdir()):
                if each.is_dir() and not (each / _MANIFEST).is_file():
                    yield each

    def require(self) -> Environment:
        """The one in use; raises :class:`ModelError` if there is none."""
        environment = self.current
        if environment is None or not environment.python.exists():
            raise ModelError(
                "vLLM is not installed; run: rigserve engines install vllm (or name an environment's python in "
                "environment, or a container image in image)"
            )
        return environment


def forget(environment: Environment) -> None:
    """What is to be removed does not count from now on, even if its removal is broken off."""
    (environment.folder / _MANIFEST).unlink(missing_ok=True)


def _read(manifest: Path) -> Environment | None:
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
        return Environment(**{**told, "folder": manifest.parent})
    except (OSError, ValueError, TypeError):
        return None


def _replace(file: Path, told: object) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(told), encoding="utf-8")
    partial.replace(file)
