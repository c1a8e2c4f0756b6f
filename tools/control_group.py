"""A control group with a limit of memory, as containers have: what a process in it may take, and what was taken."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_REMOVE_SECONDS = 10.0


class NoControlGroup(Exception):
    """This process may not make control groups with memory here; the message says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A group below the one that this process is in, of either version."""

    folder: Path

    @property
    def _is_first_version(self) -> bool:
        return (self.folder / "memory.limit_in_bytes").exists()

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command that runs another in the group."""
        enter = 'echo $$ > "$0" && exec "$@"'
        return ["sh", "-c", enter, str(self.folder / "cgroup.procs"), *command]

    @property
    def peak_mib(self) -> int:
        """The most that was taken at a time, files in the page cache counted in."""
        name = "memory.max_usage_in_bytes" if self._is_first_version else "memory.peak"
        return int((self.folder / name).read_text()) // 2**20

    @property
    def kills(self) -> int:
        """How many processes the kernel has ended because there was no memory left."""
        name = "memory.oom_control" if self._is_first_version else "memory.events"
        lines = (line.split() for line in (self.folder / name).read_text().splitlines())
        return next((int(count) for key, count in lines if key == "oom_kill"), 0)


@contextlib.contextmanager
def memory_group(limit_mib: int) -> Iterator[MemoryGroup]:
    """Make one, and remove it when all its processes have ended. Raises :class:`NoControlGroup`."""
    parent, limit = _own()
    folder = parent / f"rigserve-{os.getpid()}-{time.monotonic_ns()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise NoControlGroup(f"cannot make {folder}: {error.strerror}") from error
    try:
        try:
            (folder / limit).write_text(str(limit_mib * 2**20))
        except OSError as error:
            raise NoControlGroup(f"memory cannot be limited below {parent}: {error}") from error
        yield MemoryGroup(folder)
    finally:
        deadline = time.monotonic() + _REMOVE_SECONDS
        while True:
            try:
                folder.rmdir()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def _own() -> tuple[Path, str]:
    """The group that this process is in, and the name of a group's limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _MOUNT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::") and (_MOUNT / "cgroup.controllers").exists():
            return _MOUNT / line.removeprefix("0::").lstrip("/"), "memory.max"
    raise NoControlGroup("there are no control groups with memory")
