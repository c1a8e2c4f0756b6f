"""The price data that are used: those that came with `genai-prices`, or newer ones that the operator has fetched."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
from genai_prices.data import providers as bundled_providers
from genai_prices.data_snapshot import DataSnapshot
from genai_prices.types import Provider, StartDateConstraint, _providers_from_raw
from genai_prices.update_prices import DEFAULT_UPDATE_URL as UPDATE_URL

from serving.folders import make_private

__all__ = ["UPDATE_URL", "PriceData", "PriceDataError", "installed", "price_data", "update"]

_FILE_NAME = "prices.json"


class PriceDataError(Exception):
    """Price data cannot be fetched, read or kept; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PriceData:
    """Providers with their models' prices. ``source`` names where from, and of which day they are."""

    providers: Sequence[Provider]
    source: str


@cache
def installed() -> PriceData:
    """The data that came with the package. It dates them by its version; the newest change in them is told beside it."""
    name = f"genai-prices {version('genai-prices')}"
    newest = _newest_change(bundled_providers)
    return PriceData(bundled_providers, f"{name} (its newest dated change: {newest})")


def price_data(data_dir: Path) -> PriceData:
    """What :func:`update` has put into ``data_dir``, or else what came with the package.

    Raises :class:`PriceDataError` for a file that makes no sense.
    """
    file = data_dir / _FILE_NAME
    try:
        kept = json.loads(file.read_bytes())
        snapshot = _snapshot(kept["providers"])
        fetched = datetime.fromtimestamp(kept["fetched_unix"], UTC)
    except FileNotFoundError:
        return installed()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise PriceDataError(
            f"{file} cannot be read ({type(error).__name__}: {error}); "
            "fetch it again with `rigserve cost prices --update`, or remove it"
        ) from error
    return PriceData(snapshot.providers, f"{kept['url']}, fetched {fetched:%Y-%m-%d}")


def update(data_dir: Path, url: str = UPDATE_URL) -> PriceData:
    """Fetch the newest data over the network and keep them in ``data_dir``; raises :class:`PriceDataError`.

    Nothing else of rigserve ever asks the network for prices.
    """
    try:
        answer = httpx2.get(url, timeout=30, follow_redirects=True)
        answer.raise_for_status()
        raw = answer.json()
        _snapshot(raw)
    except (httpx2.HTTPError, ValueError, TypeError, KeyError) as error:
        raise PriceDataError(
            f"no prices from {url}: {type(error).__name__}: {error}; the ones in use stay"
        ) from error
    kept = {"url": url, "fetched_unix": datetime.now(UTC).timestamp(), "providers": raw}
    file = data_dir / _FILE_NAME
    part = file.with_suffix(".part")
    try:
        make_private(data_dir)
        part.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        raise PriceDataError(f"{file} cannot be written: {error.strerror}") from error
    return price_data(data_dir)


def _snapshot(raw: Any) -> DataSnapshot:
    if not isinstance(raw, list) or not raw:
        raise ValueError("expected a list of providers")
    # What the package itself calls when it updates; it has no public name for it.
    return DataSnapshot(_providers_from_raw(raw), from_auto_update=True)


def _newest_change(providers: Sequence[Provider]) -> str:
    """The last day, not in the future, on which a price in the data began to count."""
    today = datetime.now(UTC).date()
    days = (
        each.constraint.start_date
        for provider in providers
        for model in provider.models
        for each in (
            *(model.prices if isinstance(model.prices, list) else ()),
            *(model.price_variants or ()),
        )
        if isinstance(each.constraint, StartDateConstraint)
    )
    return str(max((day for day in days if day <= today), default="unknown"))
