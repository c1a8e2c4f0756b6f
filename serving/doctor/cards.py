"""Checks of graphics cards and their drivers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from serving.doctor.finding import Finding, ok, problem, unchecked, warning
from serving.hardware.amd import NoAmdDriver, amd_cards
from serving.hardware.catalog import UnknownCard, find_card
from serving.hardware.nvidia import NoNvidiaDriver, NvidiaCard, nvidia_driver
from serving.hardware.pci import PciCard

_BUSY_SHARE = 0.05
_CHECK = "GPU driver"


def check_cards(on_bus: Sequence[PciCard], kfd: Path = Path("/dev/kfd")) -> Iterator[Finding]:
    """What the drivers say of the cards, and what the bus has that no driver knows."""
    vendors = {card.vendor for card in on_bus}
    yield from _nvidia([card for card in on_bus if card.vendor == "NVIDIA"])
    if "AMD" in vendors:
        yield from _amd(kfd)
    if "Intel" in vendors:
        yield unchecked(
            _CHECK,
            "there is an Intel graphics card or processor graphics, which rigserve does not ask",
            "llama.cpp built with Vulkan or SYCL (engine: llama_server) can use it",
        )
    if not vendors and not _has_nvidia():
        yield ok(_CHECK, "no graphics card found: models run on the processor")


def _has_nvidia() -> bool:
    try:
        return bool(nvidia_driver().cards)
    except NoNvidiaDriver:
        return False


def _nvidia(on_bus: Sequence[PciCard]) -> Iterator[Finding]:
    try:
        driver = nvidia_driver()
    except NoNvidiaDriver as error:
        yield from _no_nvidia(error, on_bus)
        return
    if not driver.cards:
        if on_bus:
            yield problem(
                _CHECK,
                f"NVIDIA's driver {driver.version} runs, but shows no card",
                "give this user or container the devices /dev/nvidia*, for Docker with --gpus all",
            )
        return
    yield ok(_CHECK, f"NVIDIA {driver.version}, runs CUDA up to {driver.cuda_version}")
    for card in driver.cards:
        yield from _card(card)


def _no_nvidia(error: NoNvidiaDriver, on_bus: Sequence[PciCard]) -> Iterator[Finding]:
    if error.needs_reboot:
        yield problem(
            _CHECK,
            f"{error}: NVIDIA's driver was updated, but the one before is still loaded",
            "reboot",
        )
    elif not error.is_missing or on_bus:
        names = ", ".join(
            f"{card.address} ({card.driver or 'no kernel driver'})" for card in on_bus
        )
        mend = "install NVIDIA's driver: ubuntu-drivers install, or dnf install akmod-nvidia"
        if error.is_forbidden:
            mend = "let this user open /dev/nvidia*"
        elif any(card.driver == "nouveau" for card in on_bus):
            mend += ", which replaces nouveau; then reboot"
        yield problem(
            _CHECK, f"NVML says: {error}{f'; on the bus: {names}' if names else ''}", mend
        )


def _card(card: NvidiaCard) -> Iterator[Finding]:
    gpu = card.gpu
    check = f"GPU {gpu.index}"
    says = f"{gpu.name}, {gpu.total_mib / 1024:.0f} GiB, {gpu.free_mib / 1024:.1f} GiB of it free"
    if card.compute_capability is not None:
        says += f", compute capability {card.compute_capability}"
    try:
        find_card(gpu.name, gpu.total_mib)
    except UnknownCard:
        says += "; the catalog does not have it, so its speed cannot be foretold"
    yield ok(check, says)
    held_mib = gpu.total_mib - gpu.free_mib
    if held_mib > _BUSY_SHARE * gpu.total_mib:
        holders = ", ".join(str(process.pid) for process in card.processes or ())
        yield warning(
            check,
            f"{held_mib} MiB of its memory are taken{f' by processes {holders}' if holders else ''}",
            "end what does not need it; a desktop takes about 1 GiB of the card that shows it",
        )
    if card.processes is None:
        yield unchecked(check, "the driver does not tell which processes use it")
    if card.pcie is None:
        yield unchecked(check, "the driver does not tell its PCIe link")
    elif card.pcie.width < card.pcie.max_width:
        link = card.pcie
        yield warning(
            check,
            f"its PCIe link has {link.width} of {link.max_width} lanes: models load slower, "
            "and so are they when they are split over cards or offloaded in part",
            "put it into the first slot, and reseat it and its riser cable",
        )
    limit, default = card.power_limit_watts, card.default_power_limit_watts
    if limit is None or default is None:
        yield unchecked(check, "the driver does not tell its power limit")
    elif limit < default:
        yield ok(check, f"its power is limited to {limit:.0f} W of {default:.0f} W")
    if not card.has_energy_counter:
        yield ok(check, "it has no energy counter: its power is sampled instead")
    if card.is_persistent is False:
        yield warning(
            check,
            "persistence mode is off: its driver starts anew for each program, which takes seconds",
            "nvidia-smi -pm 1, or enable nvidia-persistenced",
        )


def _amd(kfd: Path) -> Iterator[Finding]:
    try:
        cards = amd_cards()
    except NoAmdDriver as error:
        if not kfd.exists():
            yield unchecked(
                _CHECK,
                f"there is an AMD card, and no {kfd}: the kernel's driver amdgpu does not compute ({error})",
                "install ROCm, if it is to be used; processor graphics need not be",
            )
        else:
            yield unchecked(
                _CHECK, f"AMD's cards were not asked: {error}", "install ROCm's amdsmi here"
            )
        return
    for card in cards:
        yield ok(
            f"GPU {card.index}",
            f"{card.name} ({card.isa}), {card.total_mib / 1024:.0f} GiB, "
            f"{card.free_mib / 1024:.1f} GiB of it free, driver {card.driver_version}",
        )
