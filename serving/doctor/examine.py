"""All checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from serving.config import Config, ConfigError, load_config
from serving.doctor.cards import check_cards
from serving.doctor.configured import (
    check_energy,
    check_folders,
    check_models,
    check_port,
    check_tls,
)
from serving.doctor.finding import Finding, ok, problem, unchecked
from serving.doctor.llama_build import check_build
from serving.doctor.system import (
    check_compiler,
    check_huge_pages,
    check_memory,
    check_open_files,
    check_processor,
    check_python,
    check_user,
)
from serving.hardware.cpu import cpu
from serving.hardware.memory import gpus
from serving.hardware.pci import pci_cards


def examine(config_file: Path) -> Iterator[Finding]:
    """Check this machine, for a config; findings come as they are made, in some seconds."""
    yield check_python()
    yield check_compiler()
    processor, on_bus = cpu(), pci_cards()
    yield check_processor(processor)
    yield from check_memory()
    yield from check_cards(on_bus)
    vendors = {card.vendor for card in on_bus if card.vendor != "Intel"}
    if gpus():
        vendors.add("NVIDIA")
    yield from check_build(processor, sorted(vendors))
    yield check_huge_pages()
    yield check_open_files()
    yield check_user()
    yield from _of_config(config_file)


def _of_config(file: Path) -> Iterator[Finding]:
    try:
        config: Config = load_config(file)
    except ConfigError as error:
        yield problem("Config", str(error), f"correct it: rigserve config check {file}")
        yield unchecked("Folders, port, models", "they are in the config")
        return
    yield ok("Config", str(file))
    yield from check_folders(config)
    yield check_port(config)
    yield from check_tls(config)
    yield check_energy(config)
    yield from check_models(config)
