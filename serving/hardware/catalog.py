"""Gaming and workstation cards, and machines of one memory: what their makers publish of them.

The data are in ``catalog.yaml``, each with its source. A card's rates follow from its compute units, the
clock that its maker states rates for, and what a unit of its architecture does a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

Vendor = Literal["nvidia", "amd", "intel", "apple"]
Precision = Literal["fp32", "fp16", "int8", "fp8", "fp4"]
Engine = Literal["llama_cpp", "vllm"]


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
    ``power_watts`` is the whole board's limit, of a machine its processor's; None where nobody says.
    ``launch_price_usd`` is the maker's, of a machine the cheapest with that memory; None where there was none.
    """

    name: str
    architecture: GpuArchitecture
    memory_mib: int
    bandwidth_gb_per_second: float
    compute_units: int
    rated_mhz: int
    power_watts: int | None
    launch_price_usd: int | None
    launch_year: int
    source: str
    has_unified_memory: bool = False
    # GeForce cards take twice as long for FP16 and FP8 products that are summed up in FP32, as PyTorch and vLLM do.
    has_half_rate_fp32_sums: bool = False

    def tera_per_second(self, precision: Precision) -> float | None:
        """Peak rate, in 10**12 operations a second; None if it does not compute in that precision."""
        operations = self.architecture.operations_per_clock.get(precision)
        if operations is None:
            return None
        return operations * self.compute_units * self.rated_mhz / 1e6


@cache
def catalog_cards() -> tuple[Card, ...]:
    """All cards of the catalog; one that is sold with several sizes of memory is there with each."""
    text = files("serving.hardware").joinpath("catalog.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.load(text, Loader=yaml.CSafeLoader)
    return tuple(card for entry in document["cards"] for card in _cards(entry, document))
