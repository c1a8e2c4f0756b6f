"""Display and compute cards on the PCI bus, as the kernel lists them, whether or not a driver knows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_DEVICES = Path("/sys/bus/pci/devices")
_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
# Display controllers, and processing accelerators.
_CLASSES = ("0x03", "0x12")


@dataclass(frozen=True, slots=True)
class PciCard:
    """``driver`` is the kernel module that has it; None: none has."""

    address: str
    vendor: str
    driver: str | None


def pci_cards(devices: Path = _DEVICES) -> list[PciCard]:
    """Cards of makers that engines have backends for; none where the kernel does not list them."""
    cards = []
    for device in sorted(devices.glob("*")):
        try:
            kind = (device / "class").read_text().strip()
            vendor = _VENDORS.get((device / "vendor").read_text().strip())
        except OSError:
            continue
        if vendor is not None and kind.startswith(_CLASSES):
            driver = device / "driver"
            name = driver.resolve().name if driver.is_symlink() else None
            cards.append(PciCard(device.name, vendor, name))
    return cards
