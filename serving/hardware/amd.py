"""AMD's cards as their driver describes them, through ``amdsmi`` where ROCm has it installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving.hardware.memory import MIB
from serving.hardware.nvidia import CardProcess


class NoAmdDriver(Exception):
    """AMD's cards cannot be asked; the message says why."""


@dataclass(frozen=True, slots=True)
class AmdCard:
    """One card. ``isa`` is what kernels are compiled for, such as ``gfx1100``."""

    index: int
    uuid: str
    name: str
    isa: str
    total_mib: int
    free_mib: int
    driver_version: str
    has_energy_counter: bool
    processes: tuple[CardProcess, ...] | None


def amd_cards() -> list[AmdCard]:
    """All AMD cards, with what is free on them now; raises :class:`NoAmdDriver`."""
    try:
        smi: Any = importlib.import_module("amdsmi")
    except ImportError as error:
        raise NoAmdDriver("the Python package amdsmi is not installed") from error
    except (OSError, KeyError, AttributeError) as error:  # it finds no library of ROCm's
        raise NoAmdDriver(f"amdsmi does not load: {error}") from error
    try:
        smi.amdsmi_init()
        handles = smi.amdsmi_get_processor_handles()
        return [_card(smi, index, handle) for index, handle in enumerate(handles)]
    except smi.AmdSmiException as error:
        raise NoAmdDriver(f"amdsmi says: {error}") from error


def _card(smi: Any, index: int, handle: object) -> AmdCard:
    asic = smi.amdsmi_get_gpu_asic_info(handle)
    memory = smi.amdsmi_get_gpu_vram_usage(handle)  # in MB of 2**20 bytes
    processes = _told(smi, smi.amdsmi_get_gpu_process_list, handle)
    return AmdCard(
        index=index,
        uuid=smi.amdsmi_get_gpu_device_uuid(handle),
        name=asic["market_name"],
        isa=asic["target_graphics_version"],
        total_mib=memory["vram_total"],
        free_mib=memory["vram_total"] - memory["vram_used"],
        driver_version=smi.amdsmi_get_gpu_driver_info(handle)["driver_version"],
        has_energy_counter=_told(smi, smi.amdsmi_get_energy_count, handle) is not None,
        processes=None
        if processes is None
        else tuple(
            CardProcess(each["pid"], -(-each["memory_usage"]["vram_mem"] // MIB))
            for each in processes
        ),
    )


def _told(smi: Any, ask: Callable[..., Any], handle: object) -> Any:
    try:
        return ask(handle)
    except smi.AmdSmiException:
        return None
