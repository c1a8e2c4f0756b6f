"""What a model is to run on: the devices of a rig as the planner sees them, there or only thought of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serving.hardware.catalog import Card

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


def device_of(card: Card, *, reserve_mib: int, free_mib: int | None = None) -> Device:
    """A card of the catalog, less what is to stay free on it; ``free_mib`` is what a real one has left."""
    there_mib = card.memory_mib if free_mib is None else free_mib
    half = 0.5 if card.has_half_rate_fp32_sums else 1.0
    fp16 = card.tera_per_second("fp16") or 0.0
    is_shared_amd = card.architecture.vendor == "amd" and card.has_unified_memory
    return Device(
        name=card.name,
        kind="amd_unified" if is_shared_amd else card.architecture.vendor,
        memory_bytes=max(0, there_mib - reserve_mib) * MIB,
        bandwidth_bytes=card.bandwidth_gb_per_second * 1e9,
        int8_operations=(card.tera_per_second("int8") or fp16) * 1e12,
        fp16_operations=half * fp16 * 1e12,
        watts=card.power_watts,
        price_usd=card.launch_price_usd,
        card=card,
    )
