"""What is written down of a request, whatever its engine says of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from serving.config import CostConfig, LlamaCppModel, RemoteModel
from serving.cost.ledger import Ledger, UsageRecord
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook
from serving.gateway.identity import ANYBODY
from serving.gateway.metering import Meter, Request
from serving.gateway.spending import Spending, prices_of
from serving.hardware.energy import ESTIMATED, EnergyMeter
from serving.metrics import Metrics
from serving.protocol.requests import ChatCompletionRequest
from serving.protocol.responses import Timings

ASKED = ChatCompletionRequest.parse(
    b'{"model": "m", "messages": [{"role": "user", "content": "Hello"}]}'
)
MODEL = RemoteModel.model_validate(
    {
        "name": "m",
        "engine": "remote",
        "base_url": "https://api.example/v1",
        "usd_per_million": {"input": 1.0, "cached_input": 0.1, "output": 2.0},
        "budget_usd": 1.0,
    }
)
# What a request that tells no usage counts as.
BOUND_USD = (100_000 * 1.0 + 1_000 * 2.0) / 1e6
TIMINGS: dict[str, Any] = Timings(0.5, 1.0, 2.0, 0.0, 0.0).to_json()


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Meter]:
    cost = CostConfig()
    with (
        closing(Ledger(tmp_path / "ledger.sqlite")) as ledger,
        closing(EnergyMeter(ESTIMATED, None, cost.power)) as power,
    ):
        # Its price has tiers.
        book = PriceBook(("google/gemini-2.5-pro",))
        yield Meter(ledger, Metrics(), CostModel(cost), book, power)


def recorded(meter: Meter, final: dict[str, Any]) -> UsageRecord:
    purchase = Spending(prices_of([MODEL])).reserve(MODEL, 100_000, 1_000)
    request = Request(
        id="r",
        endpoint=ASKED.path,
        model=MODEL,
        adapter=None,
        user="-",
        identity=ANYBODY,
        reservation=None,
        streamed=False,
        purchase=purchase,
    )
    meter.started(request, ASKED)
    return meter.finished(request, 200, final)


@pytest.mark.parametrize(
    "usage",
    [
        {},
        None,
        {"prompt_tokens": "many", "completion_tokens": 1},
        {"prompt_tokens": 1, "completion_tokens": -1},
        {"prompt_tokens": True, "completion_tokens": 1},
        {"prompt_tokens": 2**63, "completion_tokens": 1},
        {"completion_tokens": 1},
    ],
)
def test_what_is_no_usage_costs_the_most_that_it_can(meter: Meter, usage: Any) -> None:
    record = recorded(meter, {"usage": usage})
    assert record.tokens_source == "estimated"
    assert record.api_usd == pytest.approx(BOUND_USD)


def test_vectors_have_no_completion(meter: Meter) -> None:
    record = recorded(meter, {"usage": {"prompt_tokens": 1000, "total_tokens": 1000}})
    assert (record.tokens_source, record.completion_tokens) == ("engine", 0)
    assert record.api_usd == pytest.approx(0.001)


def test_nothing_costs_less_than_nothing(meter: Meter) -> None:
    details = {"cached_tokens": 10**6}
    usage = {"prompt_tokens": 1000, "completion_tokens": 0, "prompt_tokens_details": details}
    record = recorded(meter, {"usage": usage})
    assert record.cached_tokens == 1000
    assert record.api_usd == pytest.approx(0.0001)


@pytest.mark.parametrize("odd", ["soon", None, -1.0, True])
def test_times_that_are_none_are_estimated(meter: Meter, odd: Any) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    good = recorded(meter, {"usage": usage, "timings": TIMINGS})
    assert (good.timing_source, good.decode_seconds) == ("engine", 2.0)
    bad = recorded(meter, {"usage": usage, "timings": {**TIMINGS, "queue_seconds": odd}})
    assert bad.timing_source == "estimated"


def local(meter: Meter, name: str, **more: Any) -> Request:
    """A request that has gone to an engine of this rig."""
    model = LlamaCppModel(name=name, source="x.gguf")
    fields: dict[str, Any] = {
        "adapter": None,
        "user": "-",
        "identity": ANYBODY,
        "reservation": None,
    }
    request = Request(
        id="r", endpoint=ASKED.path, model=model, streamed=False, **(fields | more)
    )  # fmt: skip
    meter.started(request, ASKED)
    return request


def ended(meter: Meter, request: Request, busy_seconds: float) -> UsageRecord:
    timings = Timings(0.0, 0.0, busy_seconds, 0.0, busy_seconds).to_json()
    usage = {"prompt_tokens": 10, "completion_tokens": 10}
    return meter.finished(request, 200, {"usage": usage, "timings": timings})


def test_models_that_work_at_once_share_the_rig(meter: Meter) -> None:
    # By itself it has all of the rig; 0.2 s alone, 0.2 s beside another: 3/4 of it, and 1/2 for the other.
    first = local(meter, "one")
    time.sleep(0.2)
    second = local(meter, "two")
    time.sleep(0.2)
    beside = ended(meter, second, busy_seconds=0.2)
    both = ended(meter, first, busy_seconds=0.4)
    assert beside.decode_busy_seconds == pytest.approx(0.1, rel=0.1)
    assert both.decode_busy_seconds == pytest.approx(0.3, rel=0.1)
    alone = ended(meter, local(meter, "one"), busy_seconds=0.5)
    assert alone.decode_busy_seconds == pytest.approx(0.5)
    # Requests of one model share their engine, which knows its steps: the rig is not divided again.
    pair = [local(meter, "one"), local(meter, "one")]
    time.sleep(0.05)
    assert [ended(meter, each, 0.25).decode_busy_seconds for each in pair] == pytest.approx(
        [0.25] * 2
    )


def test_one_that_was_withdrawn_leaves_the_rig_to_others(meter: Meter) -> None:
    meter.withdrawn(local(meter, "one"))
    assert ended(meter, local(meter, "two"), 1.0).decode_busy_seconds == pytest.approx(1.0)


def test_a_record_tells_the_adapter_its_base_the_tier_and_the_idle_draw(meter: Meter) -> None:
    record = ended(meter, local(meter, "base", adapter="tune", service_tier="batch"), 2.0)
    assert (record.model, record.base_model, record.service_tier) == ("tune", "base", "batch")
    assert (record.energy_joules, record.idle_joules) == (2.0 * 95, 2.0 * 25)
    assert record.energy_source == "estimated"
    plain = ended(meter, local(meter, "base"), 2.0)
    assert (plain.model, plain.base_model, plain.service_tier) == ("base", "-", "default")
