"""The catalog of cards: sound, and its rates are the published ones."""

from __future__ import annotations

from collections import Counter

import pytest

from serving.hardware.catalog import Card, Precision, UnknownCard, catalog_cards, find_card

# From the makers' white papers and product pages: dense, sums in FP16 where the maker gives both.
PUBLISHED_TERA_PER_SECOND: dict[str, dict[Precision, float]] = {
    "Tesla P100": {"fp16": 18.7},
    "Tesla P40": {"fp32": 12, "int8": 47},
    "Tesla V100 SXM2 32 GB": {"fp16": 125},
    "Tesla T4": {"fp32": 8.1, "fp16": 65, "int8": 130},
    "GeForce RTX 2080 Ti": {"fp16": 107.6, "int8": 215.2},
    "GeForce RTX 3080": {"fp16": 119, "int8": 238},
    "GeForce RTX 3090": {"fp32": 35.6, "fp16": 142, "int8": 284},
    "RTX A6000": {"fp16": 154.8},
    "A100 SXM4 80 GB": {"fp16": 312, "int8": 624},
    "GeForce RTX 4090": {"fp32": 82.6, "fp16": 330.3, "int8": 660.6, "fp8": 660.6},
    "L4": {"fp16": 121, "fp8": 242.5},
    "L40S": {"fp16": 362.05, "fp8": 733},
    "H100 SXM HBM3": {"fp16": 989.4, "fp8": 1978.9},
    "GeForce RTX 5090": {"fp32": 104.8, "fp16": 419, "int8": 838, "fp8": 838, "fp4": 1676},
    "DGX Spark (GB10)": {"fp4": 500},
    "Jetson AGX Orin 64 GB": {"int8": 85},
    "Radeon Instinct MI60": {"fp16": 29.5, "int8": 58.9},
    "Radeon RX 6900 XT": {"fp32": 23.04, "fp16": 46.08},
    "Radeon RX 7900 XTX": {"fp32": 61.4, "fp16": 122.8},
    "Radeon RX 9070 XT": {"fp16": 195, "fp8": 389, "int8": 389},
    "Ryzen AI Max+ 395 (Radeon 8060S)": {"fp16": 59.4},
    "Arc A770": {"int8": 262},
    "Arc B580": {"int8": 233},
    "Apple M1 Max (32-core GPU)": {"fp32": 10.4},
    "Apple M2 Ultra (76-core GPU)": {"fp32": 27.2},
}


# As the head of catalog.yaml explains them.
KERNELS = {
    "llama_cpp": {
        *("mmq-mma", "mmq-fp4", "mmq-dp4a", "dequantize"),
        *("fattn-mma", "fattn-tile", "metal", "vulkan"),
    },
    "vllm": {
        *("awq", "gptq", "marlin", "int8_w8a8", "fp8_weight_only", "fp8_w8a8"),
        *("mxfp4_weight_only", "nvfp4_w4a4"),
    },
}


def card_named(name: str) -> Card:
    return next(card for card in catalog_cards() if card.name == name)


def test_it_has_the_cards_and_machines_that_people_own() -> None:
    cards = catalog_cards()
    assert len({card.name for card in cards if not card.has_unified_memory}) >= 50
    assert len({card.name for card in cards if card.has_unified_memory}) >= 15
    assert {card.architecture.vendor for card in cards} == {"nvidia", "amd", "intel", "apple"}
    assert max(Counter((card.name, card.memory_mib) for card in cards).values()) == 1


def test_every_figure_is_plausible_and_has_a_source() -> None:
    for card in catalog_cards():
        assert card.source.startswith("https://"), card.name
        assert 2 * 1024 <= card.memory_mib <= 512 * 1024, card.name
        assert 60 <= card.bandwidth_gb_per_second <= 4000, card.name
        assert card.compute_units >= 4, card.name
        assert card.rated_mhz is None or 900 <= card.rated_mhz <= 3200, card.name
        assert card.power_watts is None or 15 <= card.power_watts <= 700, card.name
        assert card.launch_price_usd is None or 100 <= card.launch_price_usd <= 10_000, card.name
        assert 2016 <= card.launch_year <= 2026, card.name
        assert card.architecture.sources, card.name
        assert card.architecture.kernels["llama_cpp"], card.name
        for engine, kernels in card.architecture.kernels.items():
            assert set(kernels) <= KERNELS[engine], card.name
        assert (card.architecture.compute_capability is None) == (
            card.architecture.vendor != "nvidia"
        ), card.name


@pytest.mark.parametrize("name", PUBLISHED_TERA_PER_SECOND)
def test_rates_are_the_published_ones(name: str) -> None:
    card = card_named(name)
    for precision, published in PUBLISHED_TERA_PER_SECOND[name].items():
        assert card.tera_per_second(precision) == pytest.approx(published, rel=0.025), precision


def test_what_a_card_cannot_compute_in_or_nobody_publishes_has_no_rate() -> None:
    assert card_named("GeForce RTX 3090").tera_per_second("fp8") is None
    assert card_named("GeForce RTX 4090").tera_per_second("fp4") is None
    assert card_named("Apple M4 (10-core GPU)").tera_per_second("fp16") is None


def test_of_apples_memory_the_gpu_has_a_part() -> None:
    assert find_card("m1 16gb").gpu_memory_mib == 10922
    assert find_card("m2 max 30-core 64gb").gpu_memory_mib == 48 * 1024
    assert find_card("dgx spark").gpu_memory_mib == 128 * 1024


@pytest.mark.parametrize(
    ("name", "memory_mib", "found"),
    [
        ("4090", None, "GeForce RTX 4090"),
        ("rtx 3080", None, "GeForce RTX 3080"),
        ("RTX3080 12gb", None, "GeForce RTX 3080 12 GB"),
        ("rtx 5060ti 16 GB", None, "GeForce RTX 5060 Ti 16 GB"),
        ("7900xtx", None, "Radeon RX 7900 XTX"),
        ("m4 max 128gb", None, "Apple M4 Max (40-core GPU)"),
        # As NVML names and measures them.
        ("NVIDIA GeForce RTX 3080", 12288, "GeForce RTX 3080 12 GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376, "GeForce RTX 4090 Laptop"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100 SXM4 80 GB"),
        ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM HBM3"),
        ("NVIDIA RTX A6000", 46068, "RTX A6000"),
        ("Tesla P40", 22919, "Tesla P40"),
        ("NVIDIA GB10", 122570, "DGX Spark (GB10)"),
        ("NVIDIA TITAN X (Pascal)", 12288, "TITAN X (Pascal)"),
        ("NVIDIA GeForce RTX 2060", 12288, "GeForce RTX 2060 12 GB"),
        ("m5 max 64gb", None, "Apple M5 Max (40-core GPU)"),
    ],
)
def test_a_card_is_found_by_the_names_that_people_and_drivers_have(
    name: str, memory_mib: int | None, found: str
) -> None:
    assert find_card(name, memory_mib).name == found


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("voodoo 2", "no card or machine of the catalog is called 'voodoo 2'"),
        ("GeForce RTX 4095", "near it: GeForce RTX 4090"),
        ("m4 max", "may be Apple M4 Max (32-core GPU), 36 GB; "),
        ("rtx 4090 48gb", "none has that much memory: GeForce RTX 4090, 24 GB"),
        ("nvidia", "no card or machine"),
    ],
)
def test_a_name_that_says_too_little_is_answered_with_what_is_near(name: str, says: str) -> None:
    with pytest.raises(UnknownCard) as refusal:
        find_card(name)
    assert says in str(refusal.value)
