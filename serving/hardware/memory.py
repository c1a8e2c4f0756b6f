"""The machine's memory: main memory, that of NVIDIA's cards, and how much of each a process holds."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import pynvml

MIB = 2**20
_PROC = Path("/proc")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


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


def host_total_mib(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Main memory that processes here may use: the machine's, or a container's limit below it."""
    total_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB
    try:
        limit = cgroup_limit.read_text().strip()
    except OSError:
        limit = "max"
    return min(total_mib, int(limit) // MIB) if limit.isdecimal() else total_mib


def host_available_mib(cgroup: Path = _CGROUP_LIMIT.parent, proc: Path = _PROC) -> int:
    """Main memory that processes here may still take, before others are pushed out."""
    available_mib = _field((proc / "meminfo").read_text(), "MemAvailable:") // 1024
    limit_mib = host_total_mib(cgroup / "memory.max")
    try:
        used_mib = int((cgroup / "memory.current").read_text()) // MIB
        # Files that were read count as used, but make way.
        used_mib -= _field((cgroup / "memory.stat").read_text(), "inactive_file") // MIB
    except (OSError, ValueError):
        return available_mib
    return max(0, min(available_mib, limit_mib - used_mib))


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
