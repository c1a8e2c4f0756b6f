"""Who used what, at what cost here and elsewhere, against which budgets: the ledger, summed up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from serving.config import CostConfig
from serving.cost.ledger import read_usage
from serving.cost.model import JOULES_PER_KWH
from serving.cost.prices import PriceBook
from serving.cost.rollup import Dimension, Selection, UsageSum
from serving.cost.traffic import Cuts

BudgetPeriod = Literal["day", "month"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a key, or a remote model, may use in a calendar day or month, in UTC. ``id`` is what the ledger knows."""

    kind: Literal["key", "model"]
    id: str
    name: str
    period: BudgetPeriod
    usd: float | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """A budget, and what was used of it since its period began."""

    budget: Budget
    usd: float
    tokens: int


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one tenant (key, model, adapter, day) used. ``usd`` is all that it cost here, bought answers included.

    ``elsewhere_usd`` is what the same requests would have cost at each commercial model, at the prices of their
    days. ``carbon_grams`` is None where no intensity is configured.
    """

    name: str
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    busy_seconds: float
    energy_joules: float
    energy_usd: float
    idle_usd: float
    hardware_usd: float
    api_usd: float
    usd: float
    elsewhere_usd: dict[str, float]
    carbon_grams: float | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class UsageReport:
    """Rows, the dearest first (days in order), and all of them together."""

    by: Dimension
    since_unix: float | None
    made_unix: float
    rows: tuple[UsageRow, ...]
    total: UsageRow
    references: tuple[str, ...]
    prices_source: str
    budgets: tuple[BudgetUse, ...]
    carbon_grams_per_kwh: float | None


def usage_report(
    ledger: Path,
    by: Dimension,
    selected: Selection,
    config: CostConfig,
    prices: PriceBook,
    budgets: Sequence[Budget],
    names: Mapping[str, str],
    now_unix: float,
) -> UsageReport:
    """Read the ledger; raises ``LedgerError``. ``names`` are those of keys, by their ids."""
    groups: dict[str, list[UsageSum]] = {}
    for each in read_usage(ledger, selected, prices.cuts, by):
        groups.setdefault(each.key, []).append(each)
    rows = [
        _row(names.get(key, key) if by == "key" else key, sums, config, prices)
        for key, sums in groups.items()
    ]
    rows.sort(key=(lambda row: row.name) if by == "day" else (lambda row: (-row.usd, row.name)))
    every = [each for sums in groups.values() for each in sums]
    return UsageReport(
        by=by,
        since_unix=selected.since or None,
        made_unix=now_unix,
        rows=tuple(rows),
        total=_row("all", every, config, prices),
        references=prices.references,
        prices_source=prices.source,
        budgets=tuple(_used(ledger, budgets, now_unix)),
        carbon_grams_per_kwh=config.carbon_grams_per_kwh,
    )


def _row(name: str, sums: Sequence[UsageSum], config: CostConfig, prices: PriceBook) -> UsageRow:
    energy_joules = sum(each.energy_joules for each in sums)
    energy_usd = sum(each.energy_usd for each in sums)
    idle_usd = sum(each.idle_usd for each in sums)
    hardware_usd = sum(each.hardware_usd for each in sums)
    api_usd = sum(each.api_usd for each in sums)
    there, hits = config.tokens_there_per_token, config.cache_hits_there
    grams = config.carbon_grams_per_kwh
    return UsageRow(
        name=name,
        requests=sum(each.tokens.requests for each in sums),
        errors=sum(each.errors for each in sums),
        prompt_tokens=sum(each.tokens.prompt_tokens for each in sums),
        cached_tokens=sum(each.tokens.cached_tokens for each in sums),
        completion_tokens=sum(each.tokens.completion_tokens for each in sums),
        busy_seconds=sum(each.prefill_busy_seconds + each.decode_busy_seconds for each in sums),
        energy_joules=energy_joules,
        energy_usd=energy_usd,
        idle_usd=idle_usd,
        hardware_usd=hardware_usd,
        api_usd=api_usd,
        usd=energy_usd + idle_usd + hardware_usd + api_usd,
        elsewhere_usd={
            reference: sum(prices.group_usd(reference, each.tokens, there, hits) for each in sums)
            for reference in prices.references
        },
        carbon_grams=None
        if grams is None
        else energy_joules * config.cooling_overhead / JOULES_PER_KWH * grams,
        estimated=any(_is_estimated(each) for each in sums),
    )


def _is_estimated(each: UsageSum) -> bool:
    sources = [each.tokens_source]
    # What another server computed took none of this rig's time or energy.
    if each.engine != "remote":
        sources += [each.timing_source, each.energy_source]
    return "estimated" in sources


def _used(ledger: Path, budgets: Sequence[Budget], now_unix: float) -> Iterable[BudgetUse]:
    used: dict[tuple[str, str], dict[str, list[UsageSum]]] = {}
    for budget in budgets:
        place = (budget.kind, budget.period)
        if place not in used:
            sums: dict[str, list[UsageSum]] = {}
            since = Selection(since=_period_begin(budget.period, now_unix))
            for each in read_usage(ledger, since, Cuts(), budget.kind):
                sums.setdefault(each.key, []).append(each)
            used[place] = sums
        own = used[place].get(budget.id, [])
        yield BudgetUse(
            budget,
            # A model's budget is what its answers may cost; a key's is all that its requests cost.
            usd=sum(
                each.api_usd
                if budget.kind == "model"
                else each.energy_usd + each.idle_usd + each.hardware_usd + each.api_usd
                for each in own
            ),
            tokens=sum(each.tokens.prompt_tokens + each.tokens.completion_tokens for each in own),
        )


def _period_begin(period: BudgetPeriod, now_unix: float) -> float:
    day = datetime.fromtimestamp(now_unix, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day if period == "day" else day.replace(day=1)).timestamp()
