"""Checks of the machine beside its cards: Python, compiler, processor, memory, limits of the operating system."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from serving.doctor.finding import Finding, ok, problem, unchecked, warning
from serving.hardware.bandwidth import read_gb_per_second
from serving.hardware.cpu import Cpu
from serving.hardware.memory import host_available_mib, host_total_mib

_OLDEST_PYTHON = (3, 11)
_COMPILERS = ("c++", "g++", "clang++")
# A connection takes a file at each end of the gateway; server.max_connections is 4096 by default.
_FILES_NEEDED = 4096
_LEAST_MEMORY_MIB = 4096
_LEAST_FREE_MIB = 1024


def check_python() -> Finding:
    """Whether it is new enough."""
    version = platform.python_version()
    if sys.version_info < _OLDEST_PYTHON:
        return problem("Python", f"{version} is too old", "install Python 3.11 or newer")
    return ok("Python", f"{version} ({sys.executable})")


def check_compiler(path: str | None = None) -> Finding:
    """Whether llama.cpp could be built here again, as an update needs."""
    for name in _COMPILERS:
        if found := shutil.which(name, path=path):
            return ok("Compiler", found)
    return warning(
        "Compiler",
        "there is no C++ compiler; what is built runs, but cannot be built anew",
        "install one: apt install g++ make, dnf install gcc-c++ make, or xcode-select --install",
    )


def check_processor(processor: Cpu, frequency: Path = Path("/sys/devices/system/cpu")) -> Finding:
    """Whether it has the instructions that make quantized models fast, and is let run at speed."""
    says = f"{processor.name}, {processor.cores} cores"
    if processor.instruction_sets:
        says += f", {' '.join(processor.instruction_sets)}"
    if platform.machine() in ("x86_64", "AMD64") and "AVX2" not in processor.instruction_sets:
        return warning(
            "Processor",
            f"{says}: without AVX2 models are slow on it",
            "keep models on a GPU (gpu_layers: -1); in a virtual machine, pass the host's CPU through",
        )
    try:
        governor = (frequency / "cpu0/cpufreq/scaling_governor").read_text().strip()
        driver = (frequency / "cpu0/cpufreq/scaling_driver").read_text().strip()
    except OSError:
        return ok("Processor", says)
    # With these drivers powersave means that the hardware decides.
    if governor == "powersave" and driver not in ("intel_pstate", "amd-pstate-epp"):
        return warning(
            "Processor",
            f"{says}: its governor is powersave, which keeps it at its lowest clock",
            "cpupower frequency-set -g performance",
        )
    return ok("Processor", says)


def check_memory(total_mib: int | None = None, free_mib: int | None = None) -> Iterator[Finding]:
    """How much main memory there is, and how fast it is read."""
    total_mib = host_total_mib() if total_mib is None else total_mib
    free_mib = host_available_mib() if free_mib is None else free_mib
    says = f"{total_mib / 1024:.1f} GiB, {free_mib / 1024:.1f} GiB of it free"
    if total_mib < _LEAST_MEMORY_MIB:
        yield warning(
            "Memory",
            f"{says}: only very small models fit beside the operating system",
            "raise a container's memory limit, or add memory",
        )
    elif free_mib < _LEAST_FREE_MIB:
        yield warning("Memory", says, "end other programs before loading models")
    else:
        yield ok("Memory", says)
    if free_mib < _LEAST_FREE_MIB:
        yield unchecked("Memory speed", "there is too little free memory to measure it")
    else:
        yield ok(
            "Memory speed",
            f"{read_gb_per_second():.0f} GB/s read by all cores, measured just now beside what else runs",
        )


def check_huge_pages(
    setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled"),
) -> Finding:
    """Whether the kernel may map models in big pages: it saves the processor lookups."""
    try:
        text = setting.read_text()
    except OSError:
        return unchecked("Huge pages", "this system does not tell")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen == "never":
        return warning(
            "Huge pages",
            "transparent huge pages are off, which costs the processor some speed",
            f"as root: echo madvise > {setting}",
        )
    return ok("Huge pages", f"transparent huge pages: {chosen}")


def check_open_files() -> Finding:
    """Whether as many connections can be open as the server allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FILES_NEEDED:
        return ok("Open files", f"at most {_amount(soft)} (ulimit -n)")
    return warning(
        "Open files",
        f"at most {soft} (ulimit -n): with more connections clients are refused",
        f"ulimit -n {min(_FILES_NEEDED, hard) if hard > 0 else _FILES_NEEDED} before the start, "
        "or LimitNOFILE= of its systemd unit",
    )


def check_user() -> Finding:
    """Whether it would run as root."""
    if os.geteuid() == 0:
        return warning(
            "User",
            "this is root: whoever breaks into the server has the machine",
            "run rigserve as a user of its own",
        )
    return ok("User", "not root")


def _amount(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
