"""What the NVIDIA cards and the machine are doing, read in the background: who asks never waits for a driver."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pynvml

_log = logging.getLogger(__name__)

_INTERVAL_SECONDS = 2.0
_PROC = Path("/proc")
# What /proc/stat counts in.
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_CPU_MODES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_MHZ = 1_000_000

# Why a card's clocks are lower than they could be. Being idle, or told so by the operator, is no such reason.
_THROTTLE_BITS = {
    "power_cap": pynvml.nvmlClocksThrottleReasonSwPowerCap,
    "thermal": pynvml.nvmlClocksThrottleReasonSwThermalSlowdown,
    "hardware_thermal": pynvml.nvmlClocksThrottleReasonHwThermalSlowdown,
    "hardware_power_brake": pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
}

_Told = TypeVar("_Told")


@dataclass(frozen=True, slots=True)
class GpuReading:
    """A card at a moment. None, or a mapping without an entry, is what the card or its driver does not tell.

    ``utilization`` is the share of time in which it computed, ``memory_utilization`` that in which its memory
    was read or written, of NVML's last sampling period (a sixth of a second to a second); ``info`` is constant.
    """

    info: Mapping[str, str]
    utilization: float | None
    memory_utilization: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_watts: float | None
    power_limit_watts: float | None
    energy_joules: float | None
    temperature_celsius: float | None
    slowdown_celsius: float | None
    clock_hertz: Mapping[str, int]
    throttled: Mapping[str, int]
    fan_ratio: float | None
    pcie_replays: int | None
    processes: int | None


@dataclass(frozen=True, slots=True)
class HostReading:
    """The machine at a moment: totals of all CPUs since its start, and memory as the kernel counts it."""

    cpu_seconds: Mapping[str, float] = field(default_factory=dict)
    memory_total_bytes: int | None = None
    memory_available_bytes: int | None = None
    disk_free_bytes: Mapping[str, int] = field(default_factory=dict)
    disk_total_bytes: Mapping[str, int] = field(default_factory=dict)


class Telemetry:
    """Reads cards and host every two seconds, first when it is made; ``gpus`` and ``host`` are the last readings.

    A card that stops answering is absent until it answers again. Close it to end its thread.
    """

    def __init__(
        self, folders: Mapping[str, Path], interval_seconds: float = _INTERVAL_SECONDS
    ) -> None:
        """``folders`` are those whose disks are watched, by the names they are told under."""
        self.gpus: Mapping[str, GpuReading] = {}
        self.host = HostReading()
        self._folders = folders
        self._interval_seconds = interval_seconds
        self._closing = threading.Event()
        self._has_nvml = _opened()
        self._read()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            self._read()

    def _read(self) -> None:
        if self._has_nvml:
            self.gpus = read_gpus()
        self.host = read_host(self._folders)

    def close(self) -> None:
        """End the readings."""
        self._closing.set()
        self._thread.join()


def _opened() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def read_gpus() -> dict[str, GpuReading]:
    """All cards that answer, by NVML's index."""
    try:
        count = pynvml.nvmlDeviceGetCount()
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        _log.debug("the NVIDIA driver does not answer: %s", error)
        return {}
    readings = {}
    for index in range(count):
        # One that fell off the bus has no handle, or loses its name.
        with contextlib.suppress(pynvml.NVMLError):
            readings[str(index)] = _read_gpu(pynvml.nvmlDeviceGetHandleByIndex(index), driver)
    return readings


def _read_gpu(card: object, driver: str) -> GpuReading:
    info = {
        "name": pynvml.nvmlDeviceGetName(card),
        "uuid": pynvml.nvmlDeviceGetUUID(card),
        "driver": driver,
    }
    load = _told(lambda: pynvml.nvmlDeviceGetUtilizationRates(card))
    memory = _told(lambda: pynvml.nvmlDeviceGetMemoryInfo(card))
    reasons = _told(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(card))
    clocks = {
        "sm": _told(lambda: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_SM)),
        "memory": _told(lambda: pynvml.nvmlDeviceGetClockInfo(card, pynvml.NVML_CLOCK_MEM)),
    }
    return GpuReading(
        info=info,
        utilization=_scaled(load and load.gpu, 1e-2),
        memory_utilization=_scaled(load and load.memory, 1e-2),
        memory_used_bytes=memory and memory.used,
        memory_total_bytes=memory and memory.total,
        power_watts=_scaled(_told(lambda: pynvml.nvmlDeviceGetPowerUsage(card)), 1e-3),
        power_limit_watts=_scaled(
            _told(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(card)), 1e-3
        ),
        energy_joules=_scaled(
            _told(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card)), 1e-3
        ),
        temperature_celsius=_told(
            lambda: pynvml.nvmlDeviceGetTemperature(card, pynvml.NVML_TEMPERATURE_GPU)
        ),
        slowdown_celsius=_told(
            lambda: pynvml.nvmlDeviceGetTemperatureThreshold(
                card, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            )
        ),
        clock_hertz={name: mhz * _MHZ for name, mhz in clocks.items() if mhz is not None},
        throttled={}
        if reasons is None
        else {name: int(bool(reasons & bit)) for name, bit in _THROTTLE_BITS.items()},
        fan_ratio=_scaled(_told(lambda: pynvml.nvmlDeviceGetFanSpeed(card)), 1e-2),
        pcie_replays=_told(lambda: pynvml.nvmlDeviceGetPcieReplayCounter(card)),
        processes=_told(lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(card))),
    )


def _told(ask: Callable[[], _Told]) -> _Told | None:
    """An answer of NVML's; None from a card that cannot tell: no fan, another driver, a container."""
    try:
        return ask()
    except pynvml.NVMLError:
        return None


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def read_host(folders: Mapping[str, Path], proc: Path = _PROC) -> HostReading:
    """The machine as /proc tells of it, as far as there is one, and the disks below ``folders``."""
    memory = _memory(proc)
    disks = {name: disk for name, folder in folders.items() if (disk := _disk(folder))}
    return HostReading(
        cpu_seconds=_cpu_seconds(proc),
        memory_total_bytes=memory.get("MemTotal"),
        memory_available_bytes=memory.get("MemAvailable"),
        disk_free_bytes={name: disk.f_bavail * disk.f_frsize for name, disk in disks.items()},
        disk_total_bytes={name: disk.f_blocks * disk.f_frsize for name, disk in disks.items()},
    )


def _cpu_seconds(proc: Path) -> dict[str, float]:
    try:
        _, *ticks = (proc / "stat").read_text().partition("\n")[0].split()
    except (OSError, ValueError):
        return {}
    return {
        mode: int(each) / _TICKS_PER_SECOND for mode, each in zip(_CPU_MODES, ticks, strict=False)
    }


def _memory(proc: Path) -> dict[str, int]:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, *_ in fields}


def _disk(folder: Path) -> Any:
    """The file system of a folder, or of its nearest ancestor if it is still to be made."""
    for each in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return os.statvfs(each)
    return None
