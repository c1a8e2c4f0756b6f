"""NVIDIA's cards as their driver describes them, through NVML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pynvml

from serving.hardware.memory import MIB, Gpu, gpu_of

# On Windows, and in some containers, the driver does not tell how much a process holds.
_NOT_TOLD = (None, 2**64 - 1)


@dataclass(frozen=True, slots=True)
class PcieLink:
    """The lanes between a card and the processor: as they are now, and the most that both ends could have."""

    generation: int
    width: int
    max_generation: int
    max_width: int


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process that computes on a card; None where the driver does not tell how much it holds."""

    pid: int
    mib: int | None


@dataclass(frozen=True, slots=True)
class NvidiaCard:
    """One card. What its driver does not tell is None."""

    gpu: Gpu
    compute_capability: str | None
    pcie: PcieLink | None
    power_limit_watts: float | None
    default_power_limit_watts: float | None
    has_energy_counter: bool
    is_persistent: bool | None
    processes: tuple[CardProcess, ...] | None


@dataclass(frozen=True, slots=True)
class NvidiaDriver:
    """The driver, and all of its cards. ``cuda_version`` is the newest that it runs."""

    version: str
    cuda_version: str
    cards: tuple[NvidiaCard, ...]


class NoNvidiaDriver(Exception):
    """There is no driver that answers. The message is NVML's; the flags tell apart what is mended differently."""

    def __init__(self, error: pynvml.NVMLError) -> None:
        super().__init__(str(error))
        code: int = getattr(error, "value", pynvml.NVML_ERROR_UNKNOWN)
        self.is_missing = code == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        self.needs_reboot = code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
        self.is_forbidden = code == pynvml.NVML_ERROR_NO_PERMISSION


def nvidia_driver() -> NvidiaDriver:
    """Ask the driver; raises :class:`NoNvidiaDriver`. A driver without cards has an empty list of them."""
    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        return NvidiaDriver(
            version=pynvml.nvmlSystemGetDriverVersion(),
            cuda_version=f"{cuda // 1000}.{cuda % 1000 // 10}",
            cards=tuple(_card(index) for index in range(pynvml.nvmlDeviceGetCount())),
        )
    except pynvml.NVMLError as error:
        raise NoNvidiaDriver(error) from error


def _card(index: int) -> NvidiaCard:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    capability = _told(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return NvidiaCard(
        gpu=gpu_of(index),
        compute_capability=None if capability is None else ".".join(map(str, capability)),
        pcie=_pcie(handle),
        power_limit_watts=_watts(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
        default_power_limit_watts=_watts(pynvml.nvmlDeviceGetPowerManagementDefaultLimit, handle),
        has_energy_counter=_told(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) is not None,
        is_persistent=_flag(pynvml.nvmlDeviceGetPersistenceMode, handle),
        processes=_processes(handle),
    )


def _told(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What the driver answers; None if it does not know, or does not tell this user."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None


def _watts(ask: Callable[..., Any], handle: object) -> float | None:
    milliwatts = _told(ask, handle)
    return None if milliwatts is None else milliwatts / 1e3


def _flag(ask: Callable[..., Any], handle: object) -> bool | None:
    told = _told(ask, handle)
    return None if told is None else told == pynvml.NVML_FEATURE_ENABLED


def _pcie(handle: object) -> PcieLink | None:
    told = [
        _told(ask, handle)
        for ask in (
            pynvml.nvmlDeviceGetCurrPcieLinkGeneration,
            pynvml.nvmlDeviceGetCurrPcieLinkWidth,
            pynvml.nvmlDeviceGetMaxPcieLinkGeneration,
            pynvml.nvmlDeviceGetMaxPcieLinkWidth,
        )
    ]
    return None if None in told else PcieLink(*told)


def _processes(handle: object) -> tuple[CardProcess, ...] | None:
    told = _told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle)
    if told is None:
        return None
    return tuple(
        CardProcess(
            process.pid,
            None if process.usedGpuMemory in _NOT_TOLD else -(-process.usedGpuMemory // MIB),
        )
        for process in told
    )
