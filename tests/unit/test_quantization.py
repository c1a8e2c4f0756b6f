"""Quality lost and memory saved: the arithmetic, and what is said of it."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from serving.llamacpp.measure import CHUNK_TOKENS, Score, chunks_of, log_softmax
from serving.quantization.measuring import Measured
from serving.quantization.render import notes, render, saving_percent, to_json, verdict
from serving.quantization.variants import Comparison, Variant


def measured(bits: float, weights: int, *, is_reference: bool = False) -> Measured:
    size_bytes = int(bits * weights / 8)
    return Measured(
        bits_per_weight=bits,
        buffers_bytes={"CPU": size_bytes // 2, "CPU_REPACK": size_bytes - size_bytes // 2},
        resident_bytes=size_bytes + 30_000_000,
        prefill_tokens_per_second=12_345.6,
        decode_tokens_per_second=1_234.56,
        scored_tokens=2040,
        perplexity=123.456,
        kl_divergence=None if is_reference else 0.12345678,
        kl_standard_error=None if is_reference else 0.001,
        same_best_token=None if is_reference else 1.0,
        build="llama-cpp-python 0.3.36",
    )


def comparison(*, source_type: str = "Q4_1", eight_bits: float = 8.5) -> Comparison:
    """A model of 70 billion weights, which no disk here has room for in 32 bits."""
    weights = 70_000_000_000

    def variant(name: str, bits: float) -> Variant:
        size_bytes = int(bits * weights / 8)
        figures = measured(bits, weights, is_reference=name == "F16")
        return Variant(name, name == source_type, Path(f"/cache/{name}"), size_bytes, figures)

    counted = Variant("F32", False, None, 4 * weights, None, "it takes 280,000 MB")
    rows = {"F16": 16.0, source_type: 5.0, "Q8_0": eight_bits, "Q5_K_M": 5.69}
    variants = (counted, *(variant(name, bits) for name, bits in rows.items()))
    return Comparison("package://a_package/a-model.gguf", source_type, variants)


def test_log_probabilities_add_up_to_one_also_of_large_logits() -> None:
    logits = np.array([1000.0, 1001.0, 998.0, -1000.0], np.float32)
    found = log_softmax(logits)
    assert np.exp(found).sum() == pytest.approx(1, abs=1e-12)
    assert found[1] - found[0] == pytest.approx(1)


def test_the_perplexity_of_a_guess_is_the_number_of_tokens() -> None:
    score = Score()
    for token in range(5):
        score.add(np.log(np.full(10, 0.1)), token, None)
    told = score.told()
    assert told["perplexity"] == pytest.approx(10)
    assert told["scored_tokens"] == 5
    assert told["kl_divergence"] is None


def test_the_divergence_is_from_the_reference_to_the_variant() -> None:
    reference, other = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    score = Score()
    score.add(np.log(other), 0, np.log(reference))
    score.add(np.log(reference), 0, np.log(reference))
    told = score.told()
    # 0.5 ln 2 + 0.25 ln 0.5 at the first place, nothing at the second.
    assert told["kl_divergence"] == pytest.approx(0.25 * np.log(2) / 2)
    assert told["same_best_token"] == 0.5
    # The standard deviation of two values is their difference over the square root of 2.
    assert told["kl_standard_error"] == pytest.approx(0.25 * np.log(2) / 2)


def test_a_text_is_read_in_whole_chunks_that_begin_as_the_model_wants() -> None:
    tokens = list(range(100, 100 + 2 * CHUNK_TOKENS + 300))
    plain = chunks_of(tokens, [])
    assert plain == [tokens[:CHUNK_TOKENS], tokens[CHUNK_TOKENS : 2 * CHUNK_TOKENS]]
    first, second = chunks_of(tokens, [1])
    assert len(first) == len(second) == CHUNK_TOKENS
    assert (first[0], second[0]) == (1, 1)
    assert (first[1:], second[1:]) == (plain[0][1:], plain[1][1:])
    assert chunks_of(tokens[: CHUNK_TOKENS - 1], []) == []
    assert len(chunks_of(list(range(100 * CHUNK_TOKENS)), [])) == 8


def test_the_table_fits_100_columns_and_nothing_is_cut() -> None:
    output = StringIO()
    Console(file=output, width=100).print(render(comparison()))
    printed = output.getvalue()
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    for wanted in (
        "Q4_1 *",
        "~280,000",
        "74,375",
        "0.1235",
        "100.0 %",
        "12,346",
        "1,234.6",
        "123.46",
    ):
        assert wanted in printed


def test_a_size_that_was_counted_is_told_with_the_reason() -> None:
    assert "~ F32: size counted from the header, not measured: it takes 280,000 MB" in notes(
        comparison()
    )
    told = to_json(comparison())["variants"][0]
    assert (told["file_bytes_source"], told["measured"]) == ("counted", None)


def test_a_quantized_source_is_no_unquantized_reference() -> None:
    assert "It is quantized itself" in notes(comparison())
    assert "It is quantized itself" not in notes(comparison(source_type="BF16"))


def test_savings_are_against_what_was_measured_only() -> None:
    found = comparison()
    eight_bit = found.of_type("Q8_0")
    assert eight_bit is not None
    assert saving_percent(eight_bit, found, "file_bytes") == pytest.approx(100 * (1 - 8.5 / 32))
    assert saving_percent(eight_bit, found, "buffers_bytes") is None
    assert saving_percent(eight_bit, found, "buffers_bytes", "F16") == pytest.approx(
        100 * (1 - 8.5 / 16), abs=0.01
    )


def test_the_claim_is_answered_also_with_no() -> None:
    assert "by 73.4 % of the file. The claim, 75 %, does not hold exactly" in verdict(comparison())
    assert "The claim, 75 %, holds" in verdict(comparison(eight_bits=7.9))
    without = Comparison("m.gguf", "F16", comparison().variants[:2])
    assert verdict(without) == ""
