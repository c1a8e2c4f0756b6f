"""Two servers on one ledger: what one has used counts at the other, once."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from serving.config import RemoteModel
from serving.cost.ledger import KeyUsage, Ledger, last_row
from serving.gateway.elsewhere import UsageElsewhere
from serving.gateway.identity import Identity
from serving.gateway.limits import Limits
from serving.gateway.spending import Spending, prices_of
from serving.keys.key import Allowance
from serving.protocol.errors import ApiError
from tests.unit.test_ledger import RECORD

IDENTITY = Identity(
    key_id="k", allowance=Allowance(requests_per_minute=4, budget_tokens=1000, budget_period="day")
)
REMOTE = RemoteModel.model_validate(
    {
        "name": "paid",
        "engine": "remote",
        "base_url": "https://api.example/v1",
        "usd_per_million": {"input": 1.0, "output": 1.0},
        "budget_usd": 5.0,
    }
)


def test_what_another_server_has_used_counts_here_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    used = replace(
        RECORD, key_id="k", started_at=time.time(), prompt_tokens=100, completion_tokens=50
    )
    paid = replace(used, key_id="-", model="paid", api_usd=4.5)
    with closing(Ledger(path)) as here, closing(Ledger(path)) as there:
        limits, spending = Limits(), Spending(prices_of([REMOTE]))
        there.append(used)
        there.flush()
        # That much was known at the start.
        elsewhere = UsageElsewhere(path, here.uid_prefix, last_row(path), limits, spending)
        for ledger, record in ((here, used), (there, used), (there, used), (there, paid)):
            ledger.append(record)
            ledger.flush()
        for _ in range(2):
            asyncio.run(elsewhere.look())
            requests, _ = limits.states(IDENTITY)
            assert requests is not None
            assert requests.remaining == 2
            assert spending.spent_usd("paid", "month") == 4.5
        with pytest.raises(ApiError, match="1000 tokens of this day 700 are left"):
            limits.reserve(IDENTITY, 701)
        with pytest.raises(ApiError, match="budget"):
            spending.reserve(REMOTE, 600_000, 0)


def test_what_comes_late_leaves_the_minute_in_its_turn() -> None:
    seconds = 0.0
    limits = Limits(lambda: seconds, lambda: 10**9 + seconds)
    seconds = 100.0
    assert limits.reserve(IDENTITY, 1)
    limits.add(KeyUsage("k", 10**9 + 70.0, 1, 0.0))
    # Of yesterday: it counts for nothing any more.
    limits.add(KeyUsage("k", 10**9 - 90_000.0, 999, 0.0))
    requests, _ = limits.states(IDENTITY)
    assert requests is not None
    assert requests.remaining == 2
    seconds = 131.0
    requests, _ = limits.states(IDENTITY)
    assert requests is not None
    assert requests.remaining == 3
    assert limits.reserve(IDENTITY, 990)
