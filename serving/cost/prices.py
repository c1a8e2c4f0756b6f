"""Commercial prices, from the `genai-prices` package, offline. rigserve keeps no price table of its own."""

from __future__ import annotations

import difflib
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from datetime import time as datetime_time
from decimal import Decimal
from types import MappingProxyType

from genai_prices.types import (
    ModelInfo,
    ModelPrice,
    Provider,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)

from serving.config import UsdPerMillion
from serving.cost.price_data import PriceData, installed
from serving.cost.traffic import SECONDS_PER_DAY, Cuts, TokenGroup

_EPOCH = date(1970, 1, 1)
_SECONDS_PER_MINUTE = 60
# How genai-prices tells the discount for work that may wait from the price of work that may not.
_CONTEXTS: Mapping[str, dict[str, str] | None] = {
    "default": None,
    "flex": {"service_tier": "flex"},
    "batch": {"processing": "batch"},
}
_NO_OVERRIDES: Mapping[str, UsdPerMillion] = MappingProxyType({})


class UnknownModel(Exception):
    """The config names a model without prices; the message lists near ones, or says what is missing."""


@dataclass(frozen=True, slots=True)
class Rates:
    """USD per million tokens, and for a request, where that costs something by itself."""

    input_usd: float
    cached_input_usd: float
    output_usd: float
    request_usd: float = 0.0

    def usd(
        self,
        prompt_tokens: float,
        cached_tokens: float,
        completion_tokens: float,
        requests: float = 1,
    ) -> float:
        """What so many tokens cost; ``prompt_tokens`` include the cached ones."""
        fresh_usd = (prompt_tokens - cached_tokens) * self.input_usd
        cached_usd = cached_tokens * self.cached_input_usd
        output_usd = completion_tokens * self.output_usd
        return (fresh_usd + cached_usd + output_usd) / 1e6 + requests * self.request_usd


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

    def __init__(
        self,
        references: Sequence[str],
        key: str = "cost.compare_to",
        *,
        overrides: Mapping[str, UsdPerMillion] = _NO_OVERRIDES,
        data: PriceData | None = None,
    ) -> None:
        """Look all models up; raises :class:`UnknownModel`, which names the config's ``key``.

        ``overrides`` count instead of the ``data`` (by default the package's own).
        """
        self._data = data or installed()
        self._overrides = {name: overrides[name] for name in references if name in overrides}
        try:
            self._models = {
                reference: _find(reference, self._data)
                for reference in references
                if reference not in overrides
            }
        except UnknownModel as error:
            raise UnknownModel(f"{key}: {error}") from None
        self._references = tuple(dict.fromkeys(references))
        self._tiers = {
            reference: tuple(sorted(set(_tiers(model))))
            for reference, (_, model) in self._models.items()
        }
        self._cuts = _cuts([model for _, model in self._models.values()])
        self._rates_between_cuts: dict[tuple[str, int, int, int, str], Rates] = {}
        self._minute = 0
        self._rates_now: dict[tuple[str, int, str], Rates] = {}

    @property
    def references(self) -> tuple[str, ...]:
        """The models that have prices here."""
        return self._references

    @property
    def source(self) -> str:
        """Where the prices come from, and of which day they are."""
        own = f"; your own for {', '.join(self._overrides)}" if self._overrides else ""
        return f"{self._data.source}{own}"

    @property
    def cuts(self) -> Cuts:
        """Where the prices of any of the models change."""
        return self._cuts

    def rates(
        self, reference: str, at_unix: float, longer_than: int = 0, service_tier: str = "default"
    ) -> Rates:
        """What tokens of a request cost there whose prompt is longer than so many, at a moment.

        What a provider does not sell as ``flex`` or ``batch`` is priced as any other request.
        """
        if (own := self._overrides.get(reference)) is not None:
            cached = own.input if own.cached_input is None else own.cached_input
            return Rates(own.input, cached, own.output)
        provider, model = self._models[reference]
        moment = datetime.fromtimestamp(at_unix, UTC)
        # What a provider resells has its maker's prices, but not its discounts: the package has it so, too.
        is_its_own = any(model is each for each in provider.models)
        prices = model.get_prices(moment, _CONTEXTS[service_tier] if is_its_own else None)
        input_usd = _rate(prices.input_mtok, longer_than)
        assert input_usd is not None
        cached_usd = _rate(prices.cache_read_mtok, longer_than)
        return Rates(
            input_usd=input_usd,
            cached_input_usd=input_usd if cached_usd is None else cached_usd,
            output_usd=_rate(prices.output_mtok, longer_than) or 0.0,
            request_usd=(_rate(prices.requests_kcount, longer_than) or 0.0) / 1e3,
        )

    def group_usd(
        self, reference: str, group: TokenGroup, tokens_there: float = 1.0, cache_hits: float = 1.0
    ) -> float:
        """What the requests of a group cost there, exactly as one by one.

        ``tokens_there`` is how many tokens one of ours is there; ``cache_hits`` the share of our cached
        tokens that would be cached there, too.
        """
        return self._rates_of(reference, group).usd(
            group.prompt_tokens * tokens_there,
            group.cached_tokens * tokens_there * cache_hits,
            group.completion_tokens * tokens_there,
            group.requests,
        )

    def _rates_of(self, reference: str, group: TokenGroup) -> Rates:
        day, second = divmod(int(group.begin_unix), SECONDS_PER_DAY)
        # Between two cuts they are the same, and a year has thousands of groups.
        epoch = bisect_right(self._cuts.days, day), bisect_right(self._cuts.seconds, second)
        key = (reference, *epoch, group.longer_than, group.service_tier)
        if (rates := self._rates_between_cuts.get(key)) is None:
            rates = self._rates_between_cuts[key] = self.rates(
                reference, group.begin_unix, group.longer_than, group.service_tier
            )
        return rates

    def usd(
        self,
        reference: str,
        prompt_tokens: float,
        cached_tokens: float,
        completion_tokens: float,
        service_tier: str = "default",
    ) -> float:
        """What one request costs there now; ``prompt_tokens`` include the cached ones."""
        longer_than = 0
        for tier in self._tiers.get(reference, ()):
            if prompt_tokens > tier:
                longer_than = tier
        # The gateway asks for every request and every model.
        now = time.time()
        if (minute := int(now // _SECONDS_PER_MINUTE)) != self._minute:
            self._minute, self._rates_now = minute, {}
        key = (reference, longer_than, service_tier)
        if (rates := self._rates_now.get(key)) is None:
            rates = self._rates_now[key] = self.rates(reference, now, longer_than, service_tier)
        return rates.usd(prompt_tokens, cached_tokens, completion_tokens)

    def per_million(self, reference: str) -> CommercialPrice:
        """List prices of now, for short prompts, nothing discounted."""
        rates = self.rates(reference, time.time())
        differs = rates.cached_input_usd != rates.input_usd
        return CommercialPrice(
            rates.input_usd, rates.cached_input_usd if differs else None, rates.output_usd
        )


def _cuts(models: Sequence[ModelInfo]) -> Cuts:
    constraints = [constraint for model in models for constraint in _constraints(model)]
    return Cuts(
        days=_ordered(
            (each.start_date - _EPOCH).days
            for each in constraints
            if isinstance(each, StartDateConstraint)
        ),
        seconds=_ordered(
            _second_of_day(moment)
            for each in constraints
            if isinstance(each, TimeOfDateConstraint)
            for moment in (each.start_time, each.end_time)
        ),
        prompt_tokens=_ordered(tier for model in models for tier in _tiers(model)),
    )


def _find(reference: str, data: PriceData) -> tuple[Provider, ModelInfo]:
    provider_id, _, model_id = reference.partition("/")
    providers = {provider.id: provider for provider in data.providers}
    provider = providers.get(provider_id)
    if provider is None:
        raise UnknownModel(_message(reference, "provider", provider_id, list(providers)))
    # Some models' matching rules do not match their own names.
    model = next((model for model in provider.models if model.id == model_id), None)
    model = model or provider.find_model(model_id, all_providers=list(data.providers))
    if model is None:
        known = [model.id for model in provider.models]
        raise UnknownModel(_message(reference, "model", model_id, known))
    if kind := _missing_price(model):
        raise UnknownModel(
            f"{reference!r}: genai-prices has no price for its {kind} tokens; "
            "name another model, or put its price into cost.prices"
        )
    return provider, model


def has_prices(model: ModelInfo) -> bool:
    """Whether a model can be compared with."""
    return _missing_price(model) is None


def _missing_price(model: ModelInfo) -> str | None:
    # Subscriptions, embeddings, gaps in the data: a missing price must not pass for a price of zero.
    for prices in _price_lists(model):
        for kind, price in (("input", prices.input_mtok), ("output", prices.output_mtok)):
            if price is None:
                return kind
    return None


def _message(reference: str, kind: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = (
        f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known)[:12])} …"
    )
    return f"{reference!r}: genai-prices knows no {kind} {name!r}; {hint}"


def _price_lists(model: ModelInfo) -> Iterator[ModelPrice]:
    if isinstance(model.prices, ModelPrice):
        yield model.prices
    else:
        yield from (each.prices for each in model.prices)


def _tiers(model: ModelInfo) -> Iterator[int]:
    variants = (variant.prices for variant in model.price_variants or ())
    for prices in (*_price_lists(model), *variants):
        for price in (
            prices.input_mtok,
            prices.cache_read_mtok,
            prices.output_mtok,
            prices.requests_kcount,
        ):
            if isinstance(price, TieredPrices):
                yield from (tier.start for tier in price.tiers)


def _constraints(model: ModelInfo) -> Iterator[StartDateConstraint | TimeOfDateConstraint]:
    conditional = [] if isinstance(model.prices, ModelPrice) else model.prices
    for each in (*conditional, *(model.price_variants or ())):
        if each.constraint is not None:
            yield each.constraint


def _rate(price: Decimal | TieredPrices | None, longer_than: int) -> float | None:
    if isinstance(price, TieredPrices):
        reached = [tier.price for tier in price.tiers if longer_than >= tier.start]
        return float(reached[-1] if reached else price.base)
    return None if price is None else float(price)


def _second_of_day(moment: datetime_time) -> int:
    zone = moment.tzinfo or UTC
    at = datetime.combine(_EPOCH, moment.replace(tzinfo=zone)).astimezone(UTC)
    return at.hour * 3600 + at.minute * 60 + at.second


def _ordered(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))
