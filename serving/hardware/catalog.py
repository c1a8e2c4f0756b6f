"""Gaming and workstation cards, and machines of one memory: what their makers publish of them.

The data are in ``catalog.yaml``, each with its source. A card's rates follow from its compute units, the
clock that its maker states rates for, and what a unit of its architecture does a clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

Vendor = Literal["nvidia", "amd", "intel", "apple"]
Precision = Literal["fp32", "fp16", "int8", "fp8", "fp4"]
Engine = Literal["llama_cpp", "vllm"]

_MEMORY = re.compile(r"\b(\d+) ?gi?b\b")
_WORD = re.compile(r"\d+-core|(?:rtx|gtx|rx)(?=\d)|[a-z]+\d*|\d+")
_SAID_OF_ALL = {"nvidia", "geforce", "amd", "radeon", "intel", "gpu", "graphics", "r", "tm"}
_MEMORY_TOLERANCE = 0.1
_MOST_LISTED = 8
_APPLES_SMALL_MIB = 36 * 1024


@dataclass(frozen=True, slots=True)
class GpuArchitecture:
    """What all cards of an architecture have in common.

    ``operations_per_clock`` is what one compute unit does, by precision, with matrix units where there are
    any, dense, a multiply-add counted as two; a precision that is missing is not computed in. ``fp16`` sums
    up in FP16 where that is faster; see :attr:`Card.has_half_rate_fp32_sums`. ``kernels`` names, by engine,
    the quantization kernels that run on it; an engine that is missing does not run on it.
    """

    name: str
    vendor: Vendor
    compute_capability: str | None
    operations_per_clock: Mapping[Precision, int]
    kernels: Mapping[Engine, tuple[str, ...]]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A card, or a machine whose processors share one memory (``has_unified_memory``).

    ``bandwidth_gb_per_second`` counts 10**9 bytes. ``rated_mhz`` is the clock its rates are stated for.
    ``power_watts`` is the board's limit, of a machine the chip's. What its maker does not publish is None.
    """

    name: str
    architecture: GpuArchitecture
    memory_mib: int
    bandwidth_gb_per_second: float
    compute_units: int
    rated_mhz: int | None
    power_watts: int | None
    launch_price_usd: int | None
    launch_year: int
    source: str
    has_unified_memory: bool = False
    # GeForce cards take twice as long for FP16 and FP8 products that are summed up in FP32, as PyTorch and vLLM do.
    has_half_rate_fp32_sums: bool = False

    @property
    def gpu_memory_mib(self) -> int:
        """What of the memory the GPU may take by itself: macOS keeps a third back, of more than 36 GiB a quarter.

        So llama.cpp prints it (``recommendedMaxWorkingSetSize``): 10.7 of 16 GiB
        (https://github.com/abetlen/llama-cpp-python/issues/687), 48 of 64 GiB
        (https://github.com/ggml-org/llama.cpp/issues/1870). ``sysctl iogpu.wired_limit_mb`` raises it.
        """
        if self.architecture.vendor != "apple":
            return self.memory_mib
        is_large = self.memory_mib > _APPLES_SMALL_MIB
        return self.memory_mib * 3 // 4 if is_large else self.memory_mib * 2 // 3

    def tera_per_second(self, precision: Precision) -> float | None:
        """Peak rate, in 10**12 operations a second; None if it has none in that precision, or nobody publishes it."""
        operations = self.architecture.operations_per_clock.get(precision)
        if operations is None or self.rated_mhz is None:
            return None
        return operations * self.compute_units * self.rated_mhz / 1e6


class UnknownCard(Exception):
    """No card of the catalog has such a name, or several do; the message lists those that are near."""


@cache
def catalog_cards() -> tuple[Card, ...]:
    """All cards of the catalog; one that is sold with several sizes of memory is there with each."""
    text = files("serving.hardware").joinpath("catalog.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader)
    architectures = {
        name: GpuArchitecture(
            name=name,
            vendor=entry["vendor"],
            compute_capability=entry.get("compute_capability"),
            operations_per_clock=entry["operations_per_clock"],
            kernels={engine: tuple(names) for engine, names in entry["kernels"].items()},
            sources=tuple(entry["sources"]),
        )
        for name, entry in document["architectures"].items()
    }
    return tuple(
        Card(
            name=entry["name"],
            architecture=architectures[entry["architecture"]],
            memory_mib=memory_gib * 1024,
            bandwidth_gb_per_second=entry["bandwidth_gb_per_second"],
            compute_units=entry["units"],
            rated_mhz=entry.get("rated_mhz"),
            power_watts=entry.get("power_watts"),
            launch_price_usd=entry.get("launch_price_usd"),
            launch_year=entry["launch_year"],
            source=entry["source"],
            has_unified_memory=entry.get("unified_memory", False),
            has_half_rate_fp32_sums=entry.get("half_rate_fp32_sums", False),
        )
        for entry in document["cards"]
        for memory_gib in entry["memory_gib"]
    )


def find_card(name: str, memory_mib: int | None = None) -> Card:
    """The card that people, or drivers, call ``name``: ``4090``, ``rtx 3080 12gb``, ``m4 max 128 gb``.

    Among those that have all of its words, and about ``memory_mib`` (or what the name says), the one with
    the fewest other words is meant. Raises :class:`UnknownCard`.
    """
    wanted, wanted_mib = _words(name)
    if memory_mib is None:
        memory_mib = wanted_mib
    near = [card for card in catalog_cards() if wanted and wanted <= _words(card.name)[0]]
    if not near:
        names = get_close_matches(name, {card.name for card in catalog_cards()}, cutoff=0.5)
        hint = f"; near it: {', '.join(names)}" if names else ""
        raise UnknownCard(f"no card or machine of the catalog is called {name!r}{hint}")
    fitting = [card for card in near if memory_mib is None or _has_about(card, memory_mib)]
    if not fitting:
        raise UnknownCard(f"{name!r}: none has that much memory: {_listed(near)}")
    fewest = min(_rest(card) for card in fitting)
    best = [card for card in fitting if _rest(card) == fewest]
    if memory_mib is None and len(best) > 1:
        best = [card for card in best if _words(card.name)[1] is None] or best
    if len(best) > 1:
        raise UnknownCard(f"{name!r} may be {_listed(best)}; name one, with its memory")
    return best[0]


def _words(name: str) -> tuple[frozenset[str], int | None]:
    """The words that tell a card from others, and the memory that its name says, in MiB."""
    text = name.casefold()
    memory = _MEMORY.search(text)
    words = frozenset(_WORD.findall(_MEMORY.sub(" ", text))) - _SAID_OF_ALL
    return words, None if memory is None else int(memory[1]) * 1024


def _rest(card: Card) -> int:
    return len(_words(card.name)[0])


def _has_about(card: Card, memory_mib: int) -> bool:
    """Drivers report less than there is: they keep some, and error correction takes some."""
    return abs(card.memory_mib - memory_mib) <= _MEMORY_TOLERANCE * card.memory_mib


def _listed(cards: Sequence[Card]) -> str:
    named = [f"{card.name}, {card.memory_mib // 1024} GB" for card in cards]
    return "; ".join(named[:_MOST_LISTED]) + ("; …" if len(named) > _MOST_LISTED else "")
