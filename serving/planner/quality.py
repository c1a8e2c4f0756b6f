"""What a quantization costs in quality, in words and as a share of perplexity."""

from __future__ import annotations

# Perplexity of Llama 3 8B above that of its 16 bits, as `llama-quantize --help` states it, by 6.2331, what llama.cpp's
# table for that model has for F16 (tools/quantize). IQ4 by its neighbours there; MXFP4 is how gpt-oss was trained.
_PERPLEXITY_OF_16_BITS = 6.2331
_ABOVE = {
    "F32": 0.0, "F16": 0.0, "BF16": 0.0, "MXFP4_MOE": 0.0, "Q8_0": 0.0026, "Q6_K": 0.0217,
    "Q5_K_M": 0.0569, "Q5_K_S": 0.1049, "Q5_1": 0.1062, "Q5_0": 0.1316,
    "Q4_K_M": 0.1754, "Q4_K_S": 0.2689, "IQ4_NL": 0.2689, "IQ4_XS": 0.2689, "Q4_1": 0.4511, "Q4_0": 0.4685,
    "Q3_K_L": 0.5562, "Q3_K_M": 0.6569, "Q3_K_S": 1.6321, "Q2_K": 3.5199,
}  # fmt: skip
# Up to such a share of perplexity: what one notices.
_GRADES = (
    (0.01, "no loss to notice"),
    (0.03, "small loss"),
    (0.08, "some loss"),
    (0.15, "clear loss"),
    (float("inf"), "heavy loss"),
)


def loss_of(mixture: str) -> float | None:
    """The share by which perplexity grows, measured on one model (Llama 3 8B); None for one that nobody measured."""
    above = _ABOVE.get(mixture)
    return None if above is None else above / _PERPLEXITY_OF_16_BITS


def grade_of(mixture: str) -> int:
    """The lower the better; those of one grade are hard to tell apart."""
    loss = loss_of(mixture)
    if loss is None:
        return 1
    return next(grade for grade, (most, _) in enumerate(_GRADES) if loss <= most)


def note_of(mixture: str) -> str:
    """A quality note for people."""
    loss = loss_of(mixture)
    if loss is None:
        return "loss not measured"
    if mixture == "MXFP4_MOE":
        return "as trained"
    return f"{_GRADES[grade_of(mixture)][1]} (+{loss:.1%})" if loss else "as published"


def loss_text(mixture: str) -> str:
    """The same in a word."""
    loss = loss_of(mixture)
    if loss is None:
        return "not measured"
    if mixture == "MXFP4_MOE":
        return "as trained"
    return f"+{loss:.1%}" if loss else ""
