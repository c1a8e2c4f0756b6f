"""The processor, as far as engines care."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# What multiplies quantized weights fast, by the kernel's names for it (x86's flags, Arm's features).
_INSTRUCTION_SETS = {
    "AVX2": {"avx2"},
    "FMA": {"fma"},
    "F16C": {"f16c"},
    "AVX-512": {"avx512f", "avx512bw", "avx512vl"},
    "AVX-VNNI": {"avx_vnni"},
    "AVX512-VNNI": {"avx512_vnni"},
    "AVX512-BF16": {"avx512_bf16"},
    "AMX-INT8": {"amx_tile", "amx_int8"},
    "AMX-BF16": {"amx_tile", "amx_bf16"},
    "NEON": {"asimd"},
    "DOTPROD": {"asimddp"},
    "I8MM": {"i8mm"},
    "SVE": {"sve"},
    "BF16": {"bf16"},
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """``cores`` are physical ones that this process may use. ``instruction_sets`` are those that matter here."""

    name: str
    cores: int
    instruction_sets: tuple[str, ...]


def cpu(cpuinfo: Path = _CPUINFO) -> Cpu:
    """This machine's processor. Where the kernel does not describe it, its name is all that is known."""
    try:
        fields = _fields(cpuinfo.read_text())
    except OSError:
        fields = {}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Cpu(
        name=fields.get("model name") or platform.processor() or platform.machine(),
        cores=physical_cores(),
        instruction_sets=tuple(
            name for name, needed in _INSTRUCTION_SETS.items() if needed <= flags
        ),
    )


def _fields(text: str) -> dict[str, str]:
    """Those of the first processor."""
    lines = text.strip().partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def physical_cores() -> int:
    """Cores this process may use, counting hyper-threads of one core once."""
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return max(len(siblings), 1)
