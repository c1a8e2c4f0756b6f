"""Commercial prices, from the `genai-prices` package, offline. rigserve keeps no price table of its own."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version

from genai_prices import Usage
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, Provider


class UnknownModel(Exception):
    """The config names a model without prices; the message lists near ones, or says what is missing."""


@dataclass(frozen=True, slots=True)
class CommercialPrice:
    """List prices in USD per million tokens, at the lowest context tier.

    ``cached_input_usd`` is None where cached tokens cost as much as others.
    """

    input_usd: float
    cached_input_usd: float | None
    output_usd: float


class PriceBook:
    """The prices of commercial models. ``references`` are PROVIDER/MODEL, as given."""

    def __init__(self, references: Sequence[str], key: str = "cost.compare_to") -> None:
        """Look all models up; raises :class:`UnknownModel`, which names the config's ``key``."""
        try:
            self._models = {reference: _find(reference) for reference in references}
        except UnknownModel as error:
            raise UnknownModel(f"{key}: {error}") from None

    @property
    def references(self) -> tuple[str, ...]:
        """The models that have prices here."""
        return tuple(self._models)

    @property
    def source(self) -> str:
        """Where the prices come from; the package dates its data by its version."""
        return f"genai-prices {version('genai-prices')}"

    def usd(
        self,
        reference: str,
        prompt_tokens: float,
        cached_tokens: float,
        completion_tokens: float,
    ) -> float:
        """What one request costs there; ``prompt_tokens`` include the cached ones, means may be fractions."""
        provider, model = self._models[reference]
        prices = model.get_prices(datetime.now(UTC))
        rates = (prices.input_mtok, prices.cache_read_mtok or prices.input_mtok, prices.output_mtok)
        # The gateway asks for every request: flat rates are multiplied here, as the package takes 0.2 ms.
        flat = [float(rate) for rate in rates if isinstance(rate, Decimal)]
        if len(flat) == len(rates):
            fresh, cached, output = flat
            input_usd = (prompt_tokens - cached_tokens) * fresh + cached_tokens * cached
            return (input_usd + completion_tokens * output) / 1e6
        usage = Usage(
            input_tokens=prompt_tokens,
            cache_read_tokens=cached_tokens,
            output_tokens=completion_tokens,
        )
        return float(model.calc_price(usage, provider).total_price)

    def per_million(self, reference: str) -> CommercialPrice:
        """List prices. Asked for with 1,000 tokens, as some models charge more for long contexts."""
        provider, model = self._models[reference]
        prices = model.calc_price(Usage(input_tokens=1000), provider).model_price
        has_cache_price = getattr(prices, "cache_read_mtok", None) is not None
        return CommercialPrice(
            input_usd=self.usd(reference, 1000, 0, 0) * 1000,
            cached_input_usd=self.usd(reference, 1000, 1000, 0) * 1000 if has_cache_price else None,
            output_usd=self.usd(reference, 0, 0, 1000) * 1000,
        )


def _find(reference: str) -> tuple[Provider, ModelInfo]:
    provider_id, _, model_id = reference.partition("/")
    snapshot = get_snapshot()
    providers = {provider.id: provider for provider in snapshot.providers}
    provider = providers.get(provider_id)
    if provider is None:
        raise UnknownModel(_message(reference, "provider", provider_id, list(providers)))
    # Some models' matching rules do not match their own names.
    model = next((model for model in provider.models if model.id == model_id), None)
    model = model or provider.find_model(model_id, all_providers=snapshot.providers)
    if model is None:
        known = [model.id for model in provider.models]
        raise UnknownModel(_message(reference, "model", model_id, known))
    # Subscriptions, embeddings, gaps in the data: a missing price must not pass for a price of zero.
    prices = model.calc_price(Usage(), provider).model_price
    for kind, price in (("input", prices.input_mtok), ("output", prices.output_mtok)):
        if price is None:
            raise UnknownModel(
                f"{reference!r}: genai-prices has no price for its {kind} tokens; name another model"
            )
    return provider, model


def _message(reference: str, kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = (
        f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known)[:12])} …"
    )
    return f"{reference!r}: genai-prices knows no {kind} {name!r}; {hint}"
