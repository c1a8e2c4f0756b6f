"""Which commercial model to compare a local one with, when the operator has named none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator

from serving.config import CostConfig
from serving.cost.price_data import PriceData
from serving.cost.prices import PriceBook, UnknownModel, has_prices

# Who hosts open weights, as genai-prices names them.
_HOSTS = ("groq", "together", "fireworks", "novita", "deepinfra", "openrouter")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bm])")
# Says how weights are kept or packed, not which they are.
_PACKING = {
    "instruct", "it", "chat", "gguf", "awq", "gptq", "fp8", "fp16", "bf16", "f16", "int4", "int8", "turbo",
    "hf", "meta", "latest", "versatile", "instant", "free",
}  # fmt: skip
# Cheaper, for answers within a day.
_FOR_LATER = ":batch"
_QUANTIZATION = re.compile(r"[-_.]i?q\d[a-z0-9_]*$")
# Billions of weights, and models that are sold for work of that class. A judgement, not a measurement.
_CLASSES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (5, ("openai/gpt-5-nano", "google/gemini-2.5-flash-lite")),
    (16, ("openai/gpt-5-nano", "openai/gpt-4o-mini", "google/gemini-2.5-flash-lite")),
    (50, ("openai/gpt-5-mini", "google/gemini-2.5-flash", "anthropic/claude-haiku-4-5")),
    (float("inf"), ("openai/gpt-5", "google/gemini-2.5-pro", "anthropic/claude-sonnet-4-5")),
)
_UNKNOWN_SIZE = _CLASSES[1][1]


def book_to_compare_with(
    config: CostConfig, data: PriceData, model: Callable[[], str]
) -> tuple[PriceBook, str]:
    """The prices of ``compare_to``, or if it is empty of peers of the ``model``; and who chose them.

    Raises :class:`UnknownModel`.
    """
    if config.compare_to:
        references, basis = config.compare_to, "the first of cost.compare_to"
    else:
        references, basis = suggest_peers(model(), data)
    return PriceBook(references, overrides=config.prices, data=data), basis


def suggest_peers(model: str, data: PriceData) -> tuple[tuple[str, ...], str]:
    """Commercial models to compare a local one with, the best peer first, and why these.

    The same weights, hosted, where somebody sells them (the cheapest first); otherwise what is sold for work
    of its size, by the number in its name.
    """
    hosted = [reference for _, reference in sorted(_same_weights(model, data))]
    if hosted:
        return tuple(hosted[:3]), f"suggested: hosts of the same weights as {model}"
    billions = _billions(model)
    if billions is None:
        basis = f"suggested: {model} does not tell its size, so small models"
        return tuple(_sold(_UNKNOWN_SIZE, data)), basis
    peers = next(peers for most, peers in _CLASSES if billions <= most)
    return tuple(_sold(peers, data)), f"suggested by size: {model} has {billions:g} billion weights"


def _sold(references: Iterable[str], data: PriceData) -> Iterator[str]:
    """Those that have prices: newer data may lack what was sold when this was written."""
    for reference in references:
        with contextlib.suppress(UnknownModel):
            PriceBook([reference], data=data)
            yield reference


def _billions(model: str) -> float | None:
    sizes = [
        float(number) / (1 if unit == "b" else 1000)
        for word in _words(model)
        if (match := _SIZE.fullmatch(word))
        for number, unit in [match.groups()]
    ]
    return max(sizes, default=None)


def _same_weights(model: str, data: PriceData) -> Iterator[tuple[float, str]]:
    wanted = _identity(model)
    # A family alone, or a size alone, is not a model.
    if len(wanted) < 2 or not any(_SIZE.fullmatch(word) for word in wanted):
        return
    for provider in data.providers:
        if provider.id not in _HOSTS:
            continue
        for each in provider.models:
            is_offered = (
                has_prices(each) and not each.deprecated and not each.id.endswith(_FOR_LATER)
            )
            if _identity(each.id) == wanted and is_offered:
                reference = f"{provider.id}/{each.id}"
                price = PriceBook([reference], data=data).per_million(reference).output_usd
                # What costs nothing is for trying out, and stops after so many requests a day.
                if price > 0:
                    yield price, reference


def _identity(name: str) -> frozenset[str]:
    name = name.rpartition("/")[2].partition(":")[0].lower()
    name = _QUANTIZATION.sub("", name.removesuffix(".gguf"))
    return frozenset(word for word in _words(name) if word not in _PACKING)


def _words(name: str) -> list[str]:
    """``Llama-3.1-8B`` and ``llama3.1:8b`` are the same: letters and numbers apart, but for sizes."""
    spaced = re.sub(r"([a-z])(\d)", r"\1 \2", name.lower())
    return [word for word in re.split(r"[^a-z0-9.]+", spaced) if word]
