"""The cost model's equations, commercial prices, and the comparison of the two."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from serving.config import CostConfig, PowerConfig
from serving.cost.comparison import compare
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook, UnknownModel
from serving.cost.render import render, saving_text, usd_text, verdict
from serving.cost.traffic import Traffic

# The worked example of docs/cost-model.md.
CONFIG = CostConfig(
    hardware_price_usd=800,
    lifetime_years=3,
    utilization=0.25,
    electricity_usd_per_kwh=0.30,
    power=PowerConfig(idle_watts=25, load_watts=95),
    compare_to=("openai/gpt-4o-mini", "openai/gpt-4o"),
)
TRAFFIC = Traffic(
    requests=100, prompt_tokens=7_800, cached_tokens=0, completion_tokens=12_800,
    prefill_busy_seconds=5.0, decode_busy_seconds=70.0, energy_joules=7_125.0,
    energy_source="estimated", timing_source="engine",
)  # fmt: skip


def test_the_worked_example_of_the_docs() -> None:
    parts = CostModel(CONFIG).parts(TRAFFIC.busy_seconds, TRAFFIC.energy_joules)
    assert parts.energy_usd == pytest.approx(0.00059375)
    assert parts.idle_usd == pytest.approx(0.00046875)
    assert parts.hardware_usd == pytest.approx(0.0025351, rel=1e-4)
    report = compare(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to))
    assert report.here_fully_loaded.output_usd_per_million == pytest.approx(0.26230, rel=1e-4)
    assert report.here_fully_loaded.input_usd_per_million == pytest.approx(0.030746, rel=1e-4)
    mini = next(row for row in report.rows if row.reference == "openai/gpt-4o-mini")
    assert mini.traffic_usd == pytest.approx(7_800 * 0.15e-6 + 12_800 * 0.60e-6)
    assert mini.saving_percent_fully_loaded == pytest.approx(
        100 * (1 - 0.0035976 / 0.00885), rel=1e-3
    )


@given(
    st.floats(0.001, 1e5), st.floats(0.001, 1e5), st.integers(1, 10**8), st.integers(1, 10**8),
    st.floats(0, 1e9),
)  # fmt: skip
def test_input_and_output_prices_add_up_to_the_cost(
    prefill: float, decode: float, prompt: int, completion: int, joules: float
) -> None:
    traffic = dataclasses.replace(
        TRAFFIC, prefill_busy_seconds=prefill, decode_busy_seconds=decode,
        prompt_tokens=prompt, completion_tokens=completion, energy_joules=joules,
    )  # fmt: skip
    report = compare(traffic, CONFIG, PriceBook(()))
    for price in (report.here_energy_only, report.here_fully_loaded):
        assert price.input_usd_per_million is not None
        assert price.output_usd_per_million is not None
        total = (
            price.input_usd_per_million * prompt + price.output_usd_per_million * completion
        ) / 1e6
        assert total == pytest.approx(price.traffic_usd)


def test_traffic_without_output_has_no_output_price() -> None:
    report = compare(dataclasses.replace(TRAFFIC, completion_tokens=0), CONFIG, PriceBook(()))
    assert report.here_energy_only.output_usd_per_million is None
    assert "-" in usd_text(None)


def test_cached_tokens_cost_less_where_the_api_says_so() -> None:
    book = PriceBook(["openai/gpt-4o-mini"])
    listed = book.per_million("openai/gpt-4o-mini")
    assert listed.cached_input_usd is not None
    assert listed.cached_input_usd < listed.input_usd
    fresh = book.usd("openai/gpt-4o-mini", 1000, 0, 0)
    assert book.usd("openai/gpt-4o-mini", 1000, 1000, 0) < fresh


def test_long_prompts_are_priced_at_their_context_tier() -> None:
    book = PriceBook(["google/gemini-2.5-pro"])
    short, long = (book.usd("google/gemini-2.5-pro", n, 0, 0) / n for n in (1_000, 300_000))
    assert long > short
    # Many short requests are not one long one.
    many = dataclasses.replace(TRAFFIC, requests=1000, prompt_tokens=300_000, completion_tokens=0)
    row = compare(many, CONFIG, book).rows[0]
    assert row.traffic_usd == pytest.approx(300_000 * short)


@pytest.mark.parametrize(
    ("reference", "hint"),
    [("openai/gpt-4o-mni", "gpt-4o-mini"), ("opnai/gpt-4o", "openai"), ("openai/zzzz", "no model")],
)
def test_unknown_models_list_near_ones(reference: str, hint: str) -> None:
    with pytest.raises(UnknownModel, match=hint):
        PriceBook([reference])


def test_the_verdict_can_say_that_the_api_is_cheaper() -> None:
    book = PriceBook(CONFIG.compare_to)
    dear = CONFIG.model_copy(update={"hardware_price_usd": 1e7})
    assert "every compared API is cheaper than this rig" in verdict(compare(TRAFFIC, dear, book))
    cheap = CONFIG.model_copy(update={"hardware_price_usd": 0.0, "electricity_usd_per_kwh": 1e-9})
    text = verdict(compare(TRAFFIC, cheap, book))
    assert "cheaper than every compared API" in text
    assert "95 % cheaper, holds against all" in text
    assert "nothing to compare" in verdict(compare(TRAFFIC, CONFIG, PriceBook(())))
    assert saving_text(-107.2) == "LOSS 107 %"


def test_estimates_are_labelled() -> None:
    book = PriceBook(CONFIG.compare_to)
    measured = dataclasses.replace(TRAFFIC, energy_source="nvml")
    for traffic, labelled in ((TRAFFIC, True), (measured, False)):
        console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(render(compare(traffic, CONFIG, book)))
        text = console.export_text()
        assert ("this rig: estimated" in text) == labelled
        assert ("rest on estimates" in text) == labelled


def test_a_report_is_plain_json() -> None:
    report = compare(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to))
    assert json.loads(json.dumps(dataclasses.asdict(report)))["traffic"]["requests"] == 100
