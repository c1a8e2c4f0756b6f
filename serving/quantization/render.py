"""A comparison of quantizations as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from serving.quantization.variants import BASELINES, Comparison, Variant

# The claim that the measurement answers: 8-bit weights take so much less memory than 32-bit ones.
CLAIMED_SAVING_PERCENT = 75
_CLAIMED_TYPE = "Q8_0"
_MB = 1e6


def render(comparison: Comparison) -> Group:
    """The table, what it rests on, and the answer to the claim."""
    return Group(_table(comparison), Text(), Text(notes(comparison)), Text(verdict(comparison)))


def _table(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("type", no_wrap=True)
    for heading in (
        "bits a\nweight", "file\nMB", "below\nF32", "buffers\nMB", "below\nF32",
        "resident\nMB", "prefill\ntok/s", "decode\ntok/s", "perpl-\nexity", "KL from\nref.", "same\ntoken",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for variant in comparison.variants:
        table.add_row(*_cells(variant, comparison))
    return table


def _cells(variant: Variant, comparison: Comparison) -> list[str]:
    name = f"{variant.type}{' *' if variant.is_source else ''}"
    measured = variant.measured
    file_saved = saving_percent(variant, comparison, "file_bytes")
    if measured is None:
        return [name, "", f"~{variant.file_bytes / _MB:,.0f}", _percent(file_saved)]
    divergence, same = measured.kl_divergence, measured.same_best_token
    return [
        name,
        f"{measured.bits_per_weight:.2f}",
        f"{variant.file_bytes / _MB:,.0f}",
        _percent(file_saved),
        f"{_buffers_bytes(variant) / _MB:,.0f}",
        _percent(saving_percent(variant, comparison, "buffers_bytes")),
        f"{measured.resident_bytes / _MB:,.0f}",
        f"{measured.prefill_tokens_per_second:,.0f}",
        f"{measured.decode_tokens_per_second:,.1f}",
        f"{measured.perplexity:.2f}",
        "ref." if divergence is None else _nats(divergence),
        "" if same is None else f"{100 * same:.1f} %",
    ]


def _nats(divergence: float) -> str:
    return f"{divergence:.4f}" if divergence >= 0.001 else f"{divergence:.0e}"


def _percent(percent: float | None) -> str:
    return "" if percent is None else f"{percent:.1f} %"


def _buffers_bytes(variant: Variant) -> int:
    assert variant.measured is not None
    return sum(variant.measured.buffers_bytes.values())


def saving_percent(
    variant: Variant, comparison: Comparison, what: str, baseline: str = "F32"
) -> float | None:
    """How much less a variant takes than a baseline: ``file_bytes``, ``buffers_bytes`` or ``resident_bytes``.

    None for the baseline itself, and where one of the two was not measured.
    """
    other = comparison.of_type(baseline)
    if other is None or other is variant:
        return None
    ours, theirs = (_size_bytes(each, what) for each in (variant, other))
    return None if ours is None or not theirs else 100 * (1 - ours / theirs)


def _size_bytes(variant: Variant, what: str) -> int | None:
    if what == "file_bytes":
        return variant.file_bytes
    if variant.measured is None:
        return None
    return _buffers_bytes(variant) if what == "buffers_bytes" else variant.measured.resident_bytes


def notes(comparison: Comparison) -> str:
    """What the figures rest on: the reference, the source, and what was only counted."""
    reference = comparison.reference
    assert reference.measured is not None
    lines = [
        f"KL: divergence from {reference.type}, nats a token, over {reference.measured.scored_tokens:,} tokens; "
        "same token: where both find the same one likeliest.",
        "buffers: llama.cpp's, for the weights. resident: by which loading made the process grow.",
        f"* the source, {comparison.source}",
    ]
    if comparison.source_is_quantized:
        lines.append(
            f"It is quantized itself: F32 and F16 are its {comparison.source_type} weights written out, and what "
            "was lost before that is not in these figures."
        )
    lines += [
        f"~ {variant.type}: size counted from the header, not measured: {variant.why_counted}"
        for variant in comparison.variants
        if variant.measured is None
    ]
    return "\n".join(lines) + "\n"


def verdict(comparison: Comparison) -> str:
    """A plain answer to the claim; empty if no 8-bit variant was asked for."""
    eight_bit = comparison.of_type(_CLAIMED_TYPE)
    if eight_bit is None:
        return ""
    savings = {
        label: percent
        for label, what in (
            ("of the file", "file_bytes"),
            ("of llama.cpp's buffers", "buffers_bytes"),
        )
        if (percent := saving_percent(eight_bit, comparison, what)) is not None
    }
    found = " and ".join(f"{percent:.1f} % {label}" for label, percent in savings.items())
    holds = all(percent >= CLAIMED_SAVING_PERCENT for percent in savings.values())
    answer = "holds" if holds else "does not hold exactly"
    return (
        f"8-bit weights ({_CLAIMED_TYPE}) take less than 32-bit ones by {found}. The claim, "
        f"{CLAIMED_SAVING_PERCENT} %, {answer}: each 32 weights share a 16-bit scale, which makes 8.5 bits a weight, "
        "73.4 % less."
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """All figures, and the savings against each baseline."""
    return {
        "source": comparison.source,
        "source_type": comparison.source_type,
        "source_is_quantized": comparison.source_is_quantized,
        "reference": comparison.reference.type,
        "variants": [
            {
                "type": variant.type,
                "is_source": variant.is_source,
                "path": None if variant.path is None else str(variant.path),
                "file_bytes": variant.file_bytes,
                "file_bytes_source": "counted" if variant.measured is None else "measured",
                "why_counted": variant.why_counted,
                "less_than": {
                    baseline: {
                        what: saving_percent(variant, comparison, what, baseline)
                        for what in ("file_bytes", "buffers_bytes", "resident_bytes")
                    }
                    for baseline in BASELINES
                },
                "measured": None
                if variant.measured is None
                else dataclasses.asdict(variant.measured),
            }
            for variant in comparison.variants
        ],
        "verdict": verdict(comparison),
    }
