"""Usage by day: exactly what the requests add up to, and priced exactly as one by one."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import astuple, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage

from serving.config import CostConfig, load_config
from serving.cost import rollup
from serving.cost.ledger import Ledger, UsageRecord, read_traffic, read_usage
from serving.cost.price_data import installed
from serving.cost.prices import PriceBook, has_prices
from serving.cost.rollup import Dimension, Selection
from serving.cost.spool import Spool
from serving.cost.traffic import Cuts, TokenGroup
from serving.cost.usage_report import Budget, usage_report
from tests.unit.test_ledger import RECORD

DAY = 86_400
# 2026-08-10: before and after days on which prices changed.
BEGIN = 20_675 * DAY
DEFAULT = load_config(Path(__file__).parents[2] / "configs" / "default.yaml").cost
REFERENCES = (*DEFAULT.compare_to, "deepseek/deepseek-v4-flash", "openai/gpt-5.6-luna")


def requests(count: int, seed: int = 0) -> list[UsageRecord]:
    """Over two months, of all sizes, tiers, models, keys."""
    chance = random.Random(seed)
    records = []
    for number in range(count):
        prompt = min(int(chance.lognormvariate(8, 2.5)), 600_000)
        adapter = chance.random() < 0.3
        key = chance.choice(("a", "b", "c", "-"))
        records.append(
            replace(
                RECORD,
                request_id=str(number),
                started_at=BEGIN + chance.random() * 60 * DAY,
                prompt_tokens=prompt,
                cached_tokens=int(prompt * chance.random()),
                completion_tokens=int(chance.lognormvariate(5, 1)),
                model=f"lora-{chance.randrange(2)}" if adapter else chance.choice(("m", "n")),
                base_model="m" if adapter else "-",
                service_tier=chance.choice(("default", "default", "flex", "batch")),
                status=chance.choice((200, 200, 200, 499)),
                key_id=key,
                tenant={"a": "x", "b": "x", "c": "y", "-": "-"}[key],
                energy_joules=chance.random() * 100,
                energy_usd=chance.random() / 1e5,
            )
        )
    return records


@pytest.fixture(scope="module")
def records() -> list[UsageRecord]:
    return requests(3000)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory, records: list[UsageRecord]) -> Path:
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with closing(Ledger(path)) as writer:
        for record in records:
            writer.append(record)
    return path


def price_of_each(book: PriceBook, reference: str, record: UsageRecord) -> float:
    """By the package itself, request by request."""
    provider, model = book._models[reference]
    context = {"default": None, "flex": {"service_tier": "flex"}, "batch": {"processing": "batch"}}
    usage = Usage(
        input_tokens=record.prompt_tokens,
        cache_read_tokens=record.cached_tokens,
        output_tokens=record.completion_tokens,
    )
    moment = datetime.fromtimestamp(record.started_at, UTC)
    price = model.calc_price(
        usage, provider, genai_request_timestamp=moment, price_context=context[record.service_tier]
    )
    return float(price.total_price)


def test_a_year_is_priced_as_its_requests_are_one_by_one(
    ledger: Path, records: list[UsageRecord]
) -> None:
    book = PriceBook(REFERENCES)
    groups = [each.tokens for each in read_usage(ledger, Selection(), book.cuts)]
    assert sum(group.requests for group in groups) == len(records)
    assert len(groups) < len(records) / 2
    for reference in REFERENCES:
        together = sum(book.group_usd(reference, group) for group in groups)
        one_by_one = sum(price_of_each(book, reference, record) for record in records)
        assert together == pytest.approx(one_by_one, rel=1e-9), reference


BY: dict[Dimension, Callable[[UsageRecord], str]] = {
    "tenant": lambda record: record.tenant,
    "key": lambda record: record.key_id,
    "model": lambda record: record.model if record.base_model == "-" else record.base_model,
    "adapter": lambda record: "-" if record.base_model == "-" else record.model,
    "day": lambda record: str(datetime.fromtimestamp(record.started_at, UTC).date()),
}


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("selected", [Selection(), Selection(since=BEGIN + 7.3 * DAY), Selection(since=BEGIN + 1.5 * DAY, until=BEGIN + 40.25 * DAY), Selection(model="m"), Selection(since=BEGIN + 3.2 * DAY, until=BEGIN + 3.6 * DAY)])  # fmt: skip
def test_sums_are_those_of_the_requests(
    ledger: Path, records: list[UsageRecord], by: Dimension, selected: Selection
) -> None:
    expected: dict[str, list[float]] = defaultdict(lambda: [0.0] * 6)
    for record in records:
        until = float("inf") if selected.until is None else selected.until
        of_model = selected.model in (None, record.model, record.base_model)
        if selected.since <= record.started_at < until and of_model:
            values: tuple[float, ...] = (
                1, record.status != 200, record.prompt_tokens, record.completion_tokens,
                record.energy_usd, record.energy_joules,
            )  # fmt: skip
            key = BY[by](record)
            expected[key] = [
                total + value for total, value in zip(expected[key], values, strict=True)
            ]
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * 6)
    for each in read_usage(ledger, selected, PriceBook(REFERENCES).cuts, by):
        tokens = each.tokens
        values = (
            tokens.requests, each.errors, tokens.prompt_tokens, tokens.completion_tokens,
            each.energy_usd, each.energy_joules,
        )  # fmt: skip
        found[each.key] = [
            total + value for total, value in zip(found[each.key], values, strict=True)
        ]
    assert found.keys() == expected.keys()
    for key, sums in expected.items():
        assert found[key] == pytest.approx(sums, rel=1e-9)
        assert found[key][:4] == sums[:4]


def test_cuts_that_the_roll_up_lacks_are_read_from_the_requests(
    ledger: Path, records: list[UsageRecord]
) -> None:
    cuts = Cuts(seconds=(43_200,), prompt_tokens=(5_000,))
    found = {
        (each.tokens.begin_unix % DAY, each.tokens.longer_than): each.tokens.requests
        for each in read_usage(ledger, Selection(), replace(cuts, days=()))
        if each.tokens.service_tier == "batch"
    }
    expected: dict[tuple[float, int], int] = defaultdict(int)
    for record in records:
        if record.service_tier == "batch":
            half = 43_200 if record.started_at % DAY >= 43_200 else 0
            expected[half, 5_000 if record.prompt_tokens > 5_000 else 0] += 1
    assert found == expected


def test_the_roll_up_has_all_cuts_of_the_prices_that_are_installed() -> None:
    """Otherwise reports are exact, but slow: then add the cut to ``rollup.CUTS``, in a new format of the ledger."""
    references = [
        f"{provider.id}/{model.id}"
        for provider in installed().providers
        for model in provider.models
        if has_prices(model)
    ]
    cuts = PriceBook(references).cuts
    assert {*cuts.seconds} <= {*rollup.CUTS.seconds, 0}
    assert {*cuts.prompt_tokens} <= {*rollup.CUTS.prompt_tokens}


def test_reports_are_exact_at_every_moment_while_others_write(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledgers = [Ledger(path) for _ in range(3)]

    def write(ledger: Ledger) -> None:
        for number in range(400):
            ledger.append(replace(RECORD, started_at=BEGIN + number * 500, prompt_tokens=number))
            if number % 20 == 0:
                ledger.flush()

    threads = [threading.Thread(target=write, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    seen: list[tuple[int, int]] = []
    with closing(sqlite3.connect(path)) as connection:
        while any(thread.is_alive() for thread in threads) or len(seen) < 5:
            # One transaction sees one state.
            connection.execute("BEGIN")
            rolled = connection.execute(
                "SELECT coalesce(sum(requests), 0), coalesce(sum(prompt_tokens), 0) FROM usage_daily"
            ).fetchone()
            single = connection.execute(
                "SELECT count(*), coalesce(sum(prompt_tokens), 0) FROM usage"
            ).fetchone()
            connection.execute("COMMIT")
            assert rolled == single
            seen.append(rolled)
    for thread in threads:
        thread.join()
    for ledger in ledgers:
        ledger.close()
    assert read_traffic(path).requests == 1200


def test_a_report_is_of_one_moment_though_it_reads_more_than_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole days come from the roll-up, the day that ``since`` cuts from the requests: another may write between."""
    path = tmp_path / "ledger.sqlite"
    since = BEGIN + 0.5 * DAY
    with closing(Ledger(path)) as ledger:

        def write() -> None:
            for days in (0.75, 1.5):
                ledger.append(replace(RECORD, started_at=BEGIN + days * DAY))
            ledger.flush()

        write()
        read_days = rollup._of_days

        def interrupted(*arguments: Any) -> Iterator[rollup.UsageSum]:
            write()
            return read_days(*arguments)

        monkeypatch.setattr(rollup, "_of_days", interrupted)
        sums = read_usage(path, Selection(since=since), Cuts(), "day")
        assert [each.tokens.requests for each in sums] == [1, 1]
        traffic = read_traffic(path, Selection(since=since))
        assert traffic.requests == 4


def test_what_was_spooled_and_written_twice_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(Ledger(path)) as ledger:
        ledger.append(RECORD)
    # As when a process ends between writing its spool into the database and removing it.
    with closing(sqlite3.connect(path)) as connection:
        uid = connection.execute("SELECT uid FROM usage").fetchone()[0]
    Spool(path.with_suffix(".spool")).add([(*astuple(RECORD), uid), (*astuple(RECORD), "another")])
    Ledger(path).close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT sum(requests) FROM usage_daily").fetchone() == (2,)
        assert connection.execute("SELECT count(*) FROM usage").fetchone() == (2,)


def test_a_report_holds_budgets_against_what_was_used(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    now = BEGIN + 20.5 * DAY
    with closing(Ledger(path)) as ledger:
        for days_ago, model, api_usd in (
            (0.1, "m", 0.0),
            (3, "m", 0.0),
            (40, "m", 0.0),
            (0.2, "remote", 0.25),
        ):
            engine = "remote" if model == "remote" else "llama_cpp"
            ledger.append(
                replace(
                    RECORD, started_at=now - days_ago * DAY, key_id="a", model=model, engine=engine,
                    api_usd=api_usd, tokens_source="estimated" if api_usd else "engine",
                )
            )  # fmt: skip
    budgets = [
        Budget("key", "a", "alice", "day", tokens=60),
        Budget("key", "a", "alice", "month", usd=0.5),
        Budget("model", "remote", "remote", "month", usd=1.0),
        Budget("key", "unused", "bob", "month", usd=1.0),
    ]
    config = CostConfig(carbon_grams_per_kwh=400.0, cooling_overhead=1.5)
    report = usage_report(
        *(path, "key", Selection(), config, PriceBook(("openai/gpt-4o",)), budgets, {"a": "alice"}),
        now,
    )
    day, month, remote, unused = report.budgets
    assert day.tokens == 30
    assert month.tokens == 45
    assert month.usd == pytest.approx(3 * 1.11e-5 + 0.25)
    assert (remote.usd, remote.tokens) == (0.25, 15)
    assert unused.usd == 0
    (row,) = report.rows
    assert (row.name, row.requests, row.estimated) == ("alice", 4, True)
    assert row.carbon_grams == pytest.approx(4 * 3.0 * 1.5 / 3.6e6 * 400)
    assert row.elsewhere_usd["openai/gpt-4o"] == pytest.approx(
        4 * (6 * 2.5 + 4 * 1.25 + 5 * 10) / 1e6
    )


def test_a_single_request_is_a_group_on_the_right_side_of_a_tier() -> None:
    book = PriceBook(["google/gemini-2.5-pro"])
    for tokens in (200_000, 200_001):
        group = TokenGroup(BEGIN, tokens - 1, "default", 1, tokens, 0, 0)
        assert book.group_usd("google/gemini-2.5-pro", group) == pytest.approx(
            book.usd("google/gemini-2.5-pro", tokens, 0, 0)
        )
    at, over = (
        book.usd("google/gemini-2.5-pro", tokens, 0, 0) / tokens for tokens in (200_000, 200_001)
    )
    assert over == pytest.approx(2 * at)
