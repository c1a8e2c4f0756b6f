"""What a model is to run on: the devices of a rig as the planner sees them, there or only thought of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from serving.hardware.bandwidth import read_gb_per_second
from serving.hardware.catalog import Card, UnknownCard, find_card
from serving.hardware.cpu import cpu
from serving.hardware.memory import gpus, host_free_mib

MIB = 2**20
Kind = Literal["nvidia", "amd", "intel", "apple", "amd_unified", "cpu"]


@dataclass(frozen=True, slots=True)
class Device:
    """A processor with its memory.

    ``memory_bytes`` is what engines may have of it. Rates are peaks, per second: bytes read, and operations in
    INT8 and FP16 (a multiply-add is two), 0 where nobody says.
    """

    name: str
    kind: Kind
    memory_bytes: int
    bandwidth_bytes: float
    int8_operations: float
    fp16_operations: float
    watts: float | None = None
    price_usd: float | None = None
    card: Card | None = None


@dataclass(frozen=True, slots=True)
class Rig:
    """The main memory with its processor, and the cards. ``is_assumed``: the host is not this machine."""

    host: Device
    cards: tuple[Device, ...] = ()
    is_assumed: bool = False

    @property
    def shares_memory(self) -> bool:
        """Whether its processors have one memory between them."""
        return any(card.card is not None and card.card.has_unified_memory for card in self.cards)

    @property
    def name(self) -> str:
        """What to call it."""
        if not self.cards:
            return self.host.name
        names = [card.name for card in self.cards]
        if len(set(names)) == 1 and len(names) > 1:
            return f"{len(names)} x {names[0]}"
        return " + ".join(names)


# What a core does of INT8 and of FP32 a clock, by the best instruction set it has, a multiply-add as two: of one
# 512-bit unit (Intel's optimization manual), of two of 256 or 128 bits. Servers' clocks are lower than desktops'.
_OPERATIONS_PER_CLOCK = (
    ("AMX-INT8", 2048, 64),
    ("AVX512-VNNI", 256, 64),
    ("AVX-VNNI", 128, 32),
    ("AVX2", 64, 32),
    ("I8MM", 128, 16),
    ("DOTPROD", 64, 16),
)
_OTHER_OPERATIONS_PER_CLOCK = (16, 8)
_CLOCK_HZ, _DESKTOP_CLOCK_HZ = 2.6e9, 4.5e9
_HIGHEST_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
# A rig that is only thought of has a desktop around its cards: two channels of DDR5, eight cores with AVX2.
_ASSUMED_MEMORY_MIB, _ASSUMED_BANDWIDTH_BYTES = 32 * 1024, 60e9
_ASSUMED_CORES = 8


def together(cards: Sequence[Device]) -> Device:
    """Equal cards that share each layer, as one: what they wait for each other is taken off, a tenth."""
    first, share = cards[0], len(cards) * (1.0 if len(cards) == 1 else 0.9)
    return replace(
        first,
        memory_bytes=len(cards) * first.memory_bytes,
        bandwidth_bytes=share * first.bandwidth_bytes,
        int8_operations=share * first.int8_operations,
        fp16_operations=share * first.fp16_operations,
    )


# Apple does not say how fast its GPUs run from the M3 on; the M2's are measured at this.
_UNKNOWN_CLOCK_MHZ = 1400


class RigError(Exception):
    """A rig cannot be told; the message says which card, and what to do."""


def this_rig(*, reserve_mib: int, gpu_reserve_mib: int) -> Rig:
    """This machine with the memory that is free now; its speed is measured, which takes half a second.

    Raises :class:`RigError`.
    """
    host = _host(
        cpu().name,
        (host_free_mib() - reserve_mib) * MIB,
        1e9 * read_gb_per_second(),
        cpu().cores * _clock_hz(),
        cpu().instruction_sets,
    )
    return Rig(host, tuple(_there(gpu_reserve_mib)))


def _clock_hz() -> float:
    try:
        return 1e3 * int(_HIGHEST_CLOCK.read_text())
    except (OSError, ValueError):
        return _CLOCK_HZ


def _there(reserve_mib: int) -> Iterator[Device]:
    for gpu in gpus():
        try:
            card = find_card(gpu.name, gpu.total_mib)
        except UnknownCard as error:
            raise RigError(f"{error}; name a card like it with --gpu") from error
        yield device_of(card, reserve_mib=reserve_mib, free_mib=gpu.free_mib)


def assumed_rig(
    names: Sequence[str], memory_mib: int | None, *, reserve_mib: int, gpu_reserve_mib: int
) -> Rig:
    """A rig with such cards, or machines of one memory, in a common desktop. Raises :class:`RigError`."""
    try:
        cards = tuple(device_of(find_card(name), reserve_mib=gpu_reserve_mib) for name in names)
    except UnknownCard as error:
        raise RigError(str(error)) from error
    unified = next(
        (each.card for each in cards if each.card and each.card.has_unified_memory), None
    )
    if unified is not None:
        memory_mib = int(_share_of_one_memory(unified) * unified.memory_mib)
    host = _host(
        "a desktop's processor",
        ((memory_mib or _ASSUMED_MEMORY_MIB) - reserve_mib) * MIB,
        _ASSUMED_BANDWIDTH_BYTES,
        _ASSUMED_CORES * _DESKTOP_CLOCK_HZ,
        ("AVX2",),
    )
    return Rig(host, cards, is_assumed=True)


def _share_of_one_memory(card: Card) -> float:
    """What a machine's GPU may use of its one memory: macOS keeps the rest (recommendedMaxWorkingSetSize)."""
    if card.architecture.vendor != "apple":
        return 1.0
    return 2 / 3 if card.memory_mib <= 36 * 1024 else 3 / 4


def _host(
    name: str, memory_bytes: int, bandwidth_bytes: float, clocks: float, sets: Sequence[str]
) -> Device:
    int8, fp32 = next(
        ((int8, fp32) for name, int8, fp32 in _OPERATIONS_PER_CLOCK if name in sets),
        _OTHER_OPERATIONS_PER_CLOCK,
    )
    return Device(
        name,
        "cpu",
        memory_bytes,
        bandwidth_bytes,
        int8_operations=clocks * int8,
        fp16_operations=clocks * fp32,
    )


def device_of(card: Card, *, reserve_mib: int, free_mib: int | None = None) -> Device:
    """A card of the catalog, less what is to stay free on it; ``free_mib`` is what a real one has left."""
    there_mib = card.memory_mib if free_mib is None else free_mib
    half = 0.5 if card.has_half_rate_fp32_sums else 1.0
    if card.rated_mhz is None:
        card = replace(card, rated_mhz=_UNKNOWN_CLOCK_MHZ)
    fp16 = card.tera_per_second("fp16") or 0.0
    is_shared_amd = card.architecture.vendor == "amd" and card.has_unified_memory
    return Device(
        name=card.name,
        kind="amd_unified" if is_shared_amd else card.architecture.vendor,
        memory_bytes=max(0, there_mib - reserve_mib) * MIB,
        bandwidth_bytes=card.bandwidth_gb_per_second * 1e9,
        int8_operations=(card.tera_per_second("int8") or fp16) * 1e12,
        # Pascal is slower in FP16 than in FP32.
        fp16_operations=max(half * fp16, card.tera_per_second("fp32") or 0.0) * 1e12,
        watts=card.power_watts,
        price_usd=card.launch_price_usd,
        card=card,
    )
