"""The machine's memory: main memory, that of NVIDIA's cards, and how much of each a process holds."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pynvml

MIB = 2**20
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA card. ``index`` is NVML's; CUDA counts in another order, but knows the UUID."""

    index: int
    uuid: str
    name: str
    total_mib: int
    free_mib: int


def gpus() -> list[Gpu]:
    """All NVIDIA cards, with what is free on them now; none without a driver."""
    try:
        pynvml.nvmlInit()
        return [gpu_of(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def gpu_of(index: int) -> Gpu:
    """One card, by NVML's index; raises ``pynvml.NVMLError``."""
    card = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(card)
    return Gpu(
        index,
        uuid=pynvml.nvmlDeviceGetUUID(card),
        name=pynvml.nvmlDeviceGetName(card),
        total_mib=memory.total // MIB,
        free_mib=memory.free // MIB,
    )


def gpu_mib_of(pids: Collection[int]) -> dict[str, int] | None:
    """What processes hold on each card, by its UUID; None where the driver does not tell."""
    try:
        pynvml.nvmlInit()
        held: dict[str, int] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            ours = [
                process.usedGpuMemory
                for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)
                if process.pid in pids
            ]
            if None in ours:  # as on Windows, and in some containers
                return None
            held[pynvml.nvmlDeviceGetUUID(card)] = -(-sum(ours) // MIB)
    except pynvml.NVMLError:
        return None
    return held


def host_total_mib(mount: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Main memory that processes here may use: the machine's, or a container's limit below it."""
    total_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
    return min((total_mib, *(group.limit_mib for group in _limited_groups(mount, proc))))


def host_available_mib(mount: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Main memory that processes here may still take, before others are pushed out."""
    available_mib = _field((proc / "meminfo").read_text(), "MemAvailable:") // 1024
    groups = _limited_groups(mount, proc)
    return max(0, min((available_mib, *(group.limit_mib - group.used_mib for group in groups))))


def host_free_mib(ours_mib: int = 0, mount: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Main memory that nobody else holds now; ``ours_mib`` is held, and yet ours to use."""
    return min(host_total_mib(mount, proc), host_available_mib(mount, proc) + ours_mib)


def host_usable_mib() -> int:
    """Main memory that is free, or held by this process and by engines below it.

    What this process itself holds is to come out of a reserve.
    """
    return host_free_mib(resident_mib(family_of(os.getpid())))


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group with a limit of memory: what this process is in, or what that is in."""

    limit_mib: int
    used_mib: int


def _limited_groups(mount: Path, proc: Path) -> list[_Group]:
    """Those whose limits hold for this process, of either version of control groups."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = mount, "memory.max", "memory.current"
            cached = ("inactive_file ", "active_file ")
        elif "memory" in controllers.split(","):
            root, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = ("total_inactive_file ", "total_active_file ")
        else:
            continue
        folder = root / path.lstrip("/")
        # Of a container that does not see where it is from outside, the root is its own.
        for each in (folder, *folder.parents) if folder.is_dir() else (root,):
            group = _group(each, limit, usage, cached)
            if group is not None:
                groups.append(group)
            if each == root:
                break
    return groups


def _group(folder: Path, limit: str, usage: str, cached: Sequence[str]) -> _Group | None:
    """What a group's files say; None without a limit."""
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / usage).read_text())
        # Files that were read count as used, but make way.
        stat = (folder / "memory.stat").read_text()
        used_bytes -= sum(_field(stat, name) for name in cached)
    except (OSError, ValueError):  # "max", for one
        return None
    return _Group(limit_bytes // MIB, used_bytes // MIB)


def resident_mib(pids: Iterable[int], proc: Path = _PROC) -> int:
    """Main memory that processes hold. Files they share count for each; a process that ended does not count."""
    total_kib = 0
    for pid in pids:
        try:
            total_kib += _field((proc / str(pid) / "status").read_text(), "VmRSS:")
        except OSError:
            continue
    return -(-total_kib // 1024)


def family_of(pid: int, proc: Path = _PROC) -> set[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything, also parentheses.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    family, unseen = set(), [pid]
    while unseen:
        each = unseen.pop()
        family.add(each)
        unseen += children.get(each, [])
    return family


def _field(text: str, name: str) -> int:
    """A number of a file of lines such as ``VmRSS:  1024 kB``; 0 if it is not there."""
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0
