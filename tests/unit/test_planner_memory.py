"""The planner's memory model, held to llama.cpp's own figures and to published files."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.engines.footprint import LONGEST_DRAFT
from serving.llamacpp import scheduler, speculation
from serving.models.architecture import Architecture
from serving.models.catalog import find_model
from serving.models.gguf import read_header
from serving.planner.memory import IN_MAIN_MEMORY, MIB, Extras, Offload, memory_of, places
from serving.planner.settings import SCORED_ROWS, Settings
from serving.planner.weights import of_files, predicted
from tools.gguf_skeleton import write_skeleton
from tools.memory_check import check, wrong_types


def architecture_of(name: str) -> Architecture:
    model = find_model(name)
    assert model is not None
    return model.architecture


# Grouped queries, a sliding window, latent attention and experts, states in place of a cache.
@pytest.mark.parametrize(
    "name",
    ["smollm2-135m-instruct", "gemma-3-4b-it", "deepseek-v2-lite-chat", "qwen3.5-35b-a3b"],
)
def test_it_is_what_llama_cpp_says(name: str, tmp_path: Path) -> None:
    for case in check(name, tmp_path):
        assert case.is_within_bounds, (case.settings, case.ratios)


@pytest.mark.parametrize(
    "name", ["smollm2-135m-instruct", "mixtral-8x7b-instruct-v0.1", "lfm2-1.2b"]
)
def test_tensors_get_the_types_that_llama_cpp_gives_them(name: str, tmp_path: Path) -> None:
    for wrong, of in wrong_types(name, tmp_path, ("Q4_K_M", "Q2_K", "IQ4_XS", "Q3_K_L")):
        assert of > 100
        assert wrong == 0


# Sizes of files as published; a header with a vocabulary of up to 20 MB comes on top of the weights.
@pytest.mark.parametrize(
    ("name", "mixture", "file_bytes"),
    [
        ("qwen3-4b", "Q4_K_M", 2_497_280_256),
        ("qwen3-30b-a3b", "Q4_K_M", 18_556_685_824),
        ("gpt-oss-20b", "MXFP4_MOE", 12_109_566_624),
    ],
)
def test_predicted_weights_are_those_of_published_files(
    name: str, mixture: str, file_bytes: int
) -> None:
    weights_bytes = predicted(architecture_of(name), mixture).total_bytes
    assert file_bytes - 20e6 < weights_bytes < file_bytes


def test_weights_of_a_file_are_read_from_it(tmp_path: Path) -> None:
    architecture = architecture_of("qwen3-0.6b")
    path = write_skeleton(tmp_path / "model.gguf", architecture, "Q4_K_M")
    parts = [(read_header(path), path.stat().st_size)]
    read = of_files(parts, len(architecture.layers))
    foretold = predicted(architecture, "Q4_K_M")
    assert read.is_tied
    # Tensors begin at multiples of 32 bytes.
    assert 0 <= read.total_bytes - foretold.total_bytes < 32 * len(list(architecture.weights()))
    assert read.embedding_bytes == foretold.embedding_bytes


def test_layers_are_shared_out_as_llama_cpp_does() -> None:
    assert places(4, Offload()) == [None] * 5
    assert places(4, Offload((1.0,), layers=2)) == [None, None, None, 0, 0]
    # The output counts as a layer; the second card has three times as much.
    assert places(7, Offload((1.0, 3.0))) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_what_is_split_is_all_there() -> None:
    architecture = architecture_of("mixtral-8x7b-instruct-v0.1")
    weights, settings = predicted(architecture, "Q4_K_M"), Settings(8192, 2)
    alone = memory_of(architecture, weights, settings).host
    for offload in (
        Offload((1.0,)),
        Offload((2.0, 1.0)),
        Offload((1.0,), layers=10),
        Offload((1.0,), experts_on_cpu=20),
    ):
        total = memory_of(architecture, weights, settings, offload).total
        assert (total.weights, total.cache) == (alone.weights, alone.cache)
    experts = memory_of(architecture, weights, settings, Offload((1.0,), experts_on_cpu=20))
    assert experts.host.weights > 0.5 * alone.weights
    assert experts.cards[0].cache == alone.cache


def test_tied_embeddings_are_on_the_card_too() -> None:
    architecture = architecture_of("qwen3-0.6b")
    weights = predicted(architecture, "Q8_0")
    memory = memory_of(architecture, weights, Settings(4096), Offload((1.0,)))
    assert memory.host.weights == weights.embedding_bytes
    assert memory.cards[0].weights == weights.total_bytes


def test_a_window_bounds_the_cache_where_the_engine_cuts_it() -> None:
    architecture = architecture_of("gemma-3-4b-it")
    weights = predicted(architecture, "Q4_K_M")

    def cache(context: int, *, full: bool) -> int:
        return memory_of(architecture, weights, Settings(context, has_full_windows=full)).host.cache

    assert cache(131072, full=True) == 4 * cache(32768, full=True)
    assert cache(131072, full=False) < cache(32768, full=True)


def test_extras_go_where_the_model_is() -> None:
    architecture = architecture_of("qwen3-0.6b")
    weights, extras = predicted(architecture, "Q8_0"), Extras(adapters_bytes=7 * MIB)
    on_host = memory_of(architecture, weights, Settings(4096), extras=extras)
    on_card = memory_of(architecture, weights, Settings(4096), Offload((1.0,)), extras)
    assert on_host.host.extras == on_card.cards[0].extras == 7 * MIB
    assert on_card.host.extras == 0


def test_what_a_step_needs_in_main_memory_beside_its_results_counts() -> None:
    architecture = architecture_of("llama-3.1-8b-instruct")
    weights = predicted(architecture, "Q4_K_M")

    def compute(settings: Settings, offload: Offload = IN_MAIN_MEMORY) -> int:
        return memory_of(architecture, weights, settings, offload).host.compute

    # Of all heads' scores a processor keeps another copy, in 16 bits; a card's work is the card's.
    plain = Settings(8192, has_flash_attention=False)
    scores = 32 * 8192 * 512
    assert compute(Settings(8192)) < 3 * scores < 6 * scores < compute(plain)
    assert compute(plain, Offload((1.0,))) < 4 * scores
    # The scores of a row for each slot, of prompts that are scored, and of drafts.
    row = 4 * architecture.vocabulary
    assert compute(Settings(8192, 16)) - compute(Settings(8192, 2)) == 14 * row
    assert compute(Settings(8192, 8, scored_rows=248)) - compute(Settings(8192, 8)) == 184 * row


def test_vocabularies_and_texts_count() -> None:
    def overhead(name: str, settings: Settings) -> int:
        architecture = architecture_of(name)
        return memory_of(architecture, predicted(architecture, "Q8_0"), settings).host.overhead

    small, large = (overhead(n, Settings(4096)) for n in ("smollm2-135m-instruct", "qwen3-0.6b"))
    assert large - small == 1024 * (151_936 - 49_152)
    long = overhead("qwen3-0.6b", Settings(32768, 8))
    assert long - large == 64 * (8 * 32768 - 4096)
    assert overhead("qwen3-0.6b", Settings(32768, 8, has_lookup=True)) > 3 * (long - large)


def test_the_engine_reads_no_more_scores_than_are_planned_for() -> None:
    assert scheduler._SCORED_ROWS == SCORED_ROWS
    assert speculation._LONGEST_DRAFT == LONGEST_DRAFT
