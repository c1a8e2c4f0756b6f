"""Usage rolled up by day: what a year's report reads instead of every request.

A trigger adds each request to its day's row in the transaction that writes it, whoever writes it: the sums
are those of the requests at every moment, under any number of writers.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serving.cost.traffic import SECONDS_PER_DAY, Cuts, TokenGroup

TABLE = "usage_daily"

# A row is also of one price a token: days are cut where today's commercial models change their prices
# (DeepSeek's hours), prompts where they have context tiers. What is cut elsewhere is read request by request.
CUTS = Cuts(
    seconds=(1_800, 3_600, 14_400, 21_600, 36_000, 59_400),
    prompt_tokens=(32_000, 100_000, 128_000, 199_999, 200_000, 256_000, 272_000, 512_000, 524_288),
)

_DIMENSIONS = (
    "tenant", "key_id", "model", "base_model", "engine", "service_tier",
    "tokens_source", "timing_source", "energy_source",
)  # fmt: skip
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_AMOUNTS = (
    "prefill_busy_seconds", "decode_busy_seconds", "energy_joules", "idle_joules",
    "energy_usd", "idle_usd", "hardware_usd", "api_usd",
)  # fmt: skip
_SUMS = (*_COUNTS, *_AMOUNTS)
_SOURCES = ("tokens_source", "timing_source", "energy_source", "engine")


def _bucket(value: str, cuts: Sequence[int], operator: str) -> str:
    """SQL for the last of the cuts that a value is beyond, 0 if none."""
    whens = "".join(f" WHEN {value} {operator} {cut} THEN {cut}" for cut in reversed(cuts))
    return f"CASE{whens} ELSE 0 END" if cuts else "0"


def _day(row: str) -> str:
    return f"CAST({row}started_at / {SECONDS_PER_DAY} AS INTEGER)"


def _second(row: str) -> str:
    return f"CAST({row}started_at AS INTEGER) % {SECONDS_PER_DAY}"


def _key_of(row: str) -> str:
    """SQL for the key of the roll-up's row that a request belongs to."""
    names = ", ".join(f"{row}{name}" for name in _DIMENSIONS)
    second = _bucket(_second(row), CUTS.seconds, ">=")
    return (
        f"{_day(row)}, {second}, {_bucket(f'{row}prompt_tokens', CUTS.prompt_tokens, '>')}, {names}"
    )


_KEY = ("day", "since_second", "longer_than", *_DIMENSIONS)
_COLUMNS = (
    *(f"{name} {'TEXT' if name in _DIMENSIONS else 'INTEGER'} NOT NULL" for name in _KEY),
    *(f"{name} INTEGER NOT NULL" for name in ("requests", "errors", *_COUNTS)),
    *(f"{name} REAL NOT NULL" for name in _AMOUNTS),
    f"PRIMARY KEY ({', '.join(_KEY)})",
)
CREATE = (
    f"CREATE TABLE {TABLE} ({', '.join(_COLUMNS)}) WITHOUT ROWID",
    "CREATE TRIGGER usage_rolled_up AFTER INSERT ON usage BEGIN "
    f"INSERT INTO {TABLE} VALUES ({_key_of('NEW.')}, 1, NEW.status != 200, "
    f"{', '.join(f'NEW.{name}' for name in _SUMS)}) ON CONFLICT DO UPDATE SET "
    "requests = requests + 1, errors = errors + excluded.errors, "
    f"{', '.join(f'{name} = {name} + excluded.{name}' for name in _SUMS)}; END",
)
# For a table of requests that was there before.
FILL = (
    f"INSERT INTO {TABLE} SELECT {_key_of('')}, count(*), sum(status != 200), "
    f"{', '.join(f'sum({name})' for name in _SUMS)} FROM usage "
    f"GROUP BY {', '.join(str(number + 1) for number in range(len(_KEY)))}",
)

Dimension = Literal["tenant", "key", "model", "adapter", "day"]

# SQL over columns that both tables have; days are UTC's.
_BY: Mapping[Dimension | None, str] = {
    None: "''",
    "tenant": "tenant",
    "key": "key_id",
    "model": "CASE base_model WHEN '-' THEN model ELSE base_model END",
    "adapter": "CASE base_model WHEN '-' THEN '-' ELSE model END",
    "day": f"date({{day}} * {SECONDS_PER_DAY}, 'unixepoch')",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Which requests: from Unix time ``since`` on and before ``until``; of a model with its adapters, or of one of these."""

    since: float = 0.0
    until: float | None = None
    model: str | None = None
    own_engines_only: bool = False


@dataclass(frozen=True, slots=True)
class UsageSum:
    """What requests of one price a token used together, and who measured it. ``key`` is what they were grouped by."""

    key: str
    tokens: TokenGroup
    errors: int
    prefill_busy_seconds: float
    decode_busy_seconds: float
    energy_joules: float
    idle_joules: float
    energy_usd: float
    idle_usd: float
    hardware_usd: float
    api_usd: float
    tokens_source: str
    timing_source: str
    energy_source: str
    engine: str


def read_sums(
    connection: sqlite3.Connection, selected: Selection, cuts: Cuts, by: Dimension | None = None
) -> list[UsageSum]:
    """The usage that is ``selected``, in sums that no cut goes through.

    Whole days come from the roll-up, parts of days from the requests themselves; and so does all when there
    is a cut that the roll-up does not have.
    """
    until = 1e12 if selected.until is None else selected.until
    first_day = -int(-selected.since // SECONDS_PER_DAY)
    end_day = int(until // SECONDS_PER_DAY)
    known = {*cuts.seconds} <= {*CUTS.seconds} and {*cuts.prompt_tokens} <= {*CUTS.prompt_tokens}
    if not known or first_day >= end_day:
        return list(_of_requests(connection, selected, cuts, by, selected.since, until))
    begins, ends = first_day * SECONDS_PER_DAY, end_day * SECONDS_PER_DAY
    return [
        *_of_requests(connection, selected, cuts, by, selected.since, begins),
        *_of_days(connection, selected, cuts, by, first_day, end_day),
        *_of_requests(connection, selected, cuts, by, ends, until),
    ]


def _epoch(day: str, cuts: Cuts) -> str:
    """SQL that tells days apart between which there is a cut."""
    # A number by itself would mean a column.
    return _bucket(day, cuts.days, ">=") if cuts.days else "NULL"


def _of_requests(
    connection: sqlite3.Connection,
    selected: Selection,
    cuts: Cuts,
    by: Dimension | None,
    begin: float,
    end: float,
) -> Iterator[UsageSum]:
    period = _bucket(_second(""), cuts.seconds, ">=")
    tier = _bucket("prompt_tokens", cuts.prompt_tokens, ">")
    day = _day("")
    columns = (
        f"{_BY[by].format(day=day)}, min({day}), {period}, {tier}, service_tier, "
        "count(*), sum(status != 200)"
    )
    where = "started_at >= :begin AND started_at < :end"
    epoch, values = _epoch(day, cuts), {"begin": begin, "end": end}
    return _read(connection, "usage", columns, epoch, where, selected, values)


def _of_days(
    connection: sqlite3.Connection,
    selected: Selection,
    cuts: Cuts,
    by: Dimension | None,
    begin: int,
    end: int,
) -> Iterator[UsageSum]:
    period = _bucket("since_second", cuts.seconds, ">=")
    tier = _bucket("longer_than", cuts.prompt_tokens, ">=")
    columns = (
        f"{_BY[by].format(day='day')}, min(day), {period}, {tier}, service_tier, "
        "sum(requests), sum(errors)"
    )
    where = "day >= :begin AND day < :end"
    epoch, values = _epoch("day", cuts), {"begin": begin, "end": end}
    return _read(connection, TABLE, columns, epoch, where, selected, values)


def _read(
    connection: sqlite3.Connection,
    table: str,
    columns: str,
    epoch: str,
    where: str,
    selected: Selection,
    values: Mapping[str, float],
) -> Iterator[UsageSum]:
    sums = ", ".join(f"sum({name})" for name in _SUMS)
    sources = ", ".join(_SOURCES)
    own = "AND engine != 'remote'" if selected.own_engines_only else ""
    of_model = "AND (model = :model OR base_model = :model)" if selected.model else ""
    rows = connection.execute(
        f"SELECT {columns}, {sums}, {sources} FROM {table} WHERE {where} {own} {of_model} "
        f"GROUP BY 1, {epoch}, 3, 4, 5, {sources}",
        {**values, "model": selected.model},
    )
    for key, first_day, second, longer_than, tier, requests, errors, *rest in rows:
        prompt, cached, completion, *amounts_and_sources = rest
        tokens = TokenGroup(
            begin_unix=first_day * SECONDS_PER_DAY + second,
            longer_than=longer_than,
            service_tier=tier,
            requests=requests,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
        )
        yield UsageSum(key, tokens, errors, *amounts_and_sources)
