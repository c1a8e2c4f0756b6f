"""The cost model's equations, commercial prices, and the comparison of the two."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from serving.config import CostConfig, PowerConfig, load_config
from serving.cost.comparison import CostReport, compare
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook, UnknownModel
from serving.cost.render import render, saving_text, usd_text, verdict
from serving.cost.traffic import Traffic

COST_MODEL = Path(__file__).parents[2] / "docs" / "cost-model.md"
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


def worked_example() -> dict[str, float]:
    """The table at the end of the document: each figure's name, without its formula, and value."""
    table = COST_MODEL.read_text(encoding="utf-8").partition("## A worked example")[2]
    rows = re.findall(r"^\| (.+?)(?: = .+?| at .+?)? \| ([\d.]+) \|", table, re.MULTILINE)
    return {name.replace("`", ""): float(value) for name, value in rows}


def test_the_worked_example_of_the_docs() -> None:
    stated = worked_example()
    config = CostConfig(
        hardware_price_usd=stated["hardware_price_usd"],
        lifetime_years=stated["lifetime_years"],
        utilization=stated["utilization"],
        electricity_usd_per_kwh=stated["electricity_usd_per_kwh"],
        power=PowerConfig(idle_watts=stated["idle_watts"], load_watts=stated["load_watts"]),
    )
    prompt, completion = int(stated["prompt_tokens"]), int(stated["completion_tokens"])
    prefill, decode = stated["prefill_busy_seconds"], stated["decode_busy_seconds"]
    joules = (prefill + decode) * stated["load_watts"]
    parts = CostModel(config).parts(prefill + decode, joules)
    traffic = dataclasses.replace(
        TRAFFIC, prompt_tokens=prompt, completion_tokens=completion,
        prefill_busy_seconds=prefill, decode_busy_seconds=decode, energy_joules=joules,
    )  # fmt: skip
    report = compare(traffic, config, PriceBook(()))
    usd_there = (prompt * 0.15 + completion * 0.60) / 1e6
    computed = {
        "joules": joules,
        "energy_usd": parts.energy_usd,
        "hardware_usd": parts.hardware_usd,
        "idle_usd": parts.idle_usd,
        "all costs": parts.total_usd,
        "usd_there": usd_there,
    }
    for name, here in (
        ("energy only", report.here_energy_only),
        ("all costs", report.here_fully_loaded),
    ):
        assert here.input_usd_per_million is not None
        assert here.output_usd_per_million is not None
        computed[f"{name}, input_usd_per_million"] = here.input_usd_per_million
        computed[f"{name}, output_usd_per_million"] = here.output_usd_per_million
        computed[f"{name}, saving_percent"] = 100 * (1 - here.traffic_usd / usd_there)
    assert {name: stated[name] for name in computed} == pytest.approx(computed, rel=2e-5)
    assert len(stated) == len(computed) + 10  # and nothing stands there that is not checked


def test_savings_are_against_the_same_tokens_at_list_prices() -> None:
    book = PriceBook(CONFIG.compare_to)
    report = compare(TRAFFIC, CONFIG, book)
    assert {row.reference for row in report.rows} == set(CONFIG.compare_to)
    for row in report.rows:
        listed = book.per_million(row.reference)
        there = (7_800 * listed.input_usd + 12_800 * listed.output_usd) / 1e6
        assert row.traffic_usd == pytest.approx(there)
        saved = there - report.here_fully_loaded.traffic_usd
        assert row.saving_percent_fully_loaded == pytest.approx(100 * saved / there)


@given(
    st.floats(0, 1e6), st.floats(0, 1e9), st.floats(0, 1e6), st.floats(0, 1e9),
    st.floats(0.01, 1), st.floats(0, 500),
)  # fmt: skip
def test_the_parts_of_two_requests_add_up(
    busy: float, joules: float, more_busy: float, more_joules: float, share: float, idle: float
) -> None:
    power = PowerConfig(idle_watts=idle, load_watts=500)
    model = CostModel(CONFIG.model_copy(update={"utilization": share, "power": power}))
    first, second = model.parts(busy, joules), model.parts(more_busy, more_joules)
    both = model.parts(busy + more_busy, joules + more_joules)
    assert both.energy_usd == pytest.approx(first.energy_usd + second.energy_usd)
    assert both.idle_usd == pytest.approx(first.idle_usd + second.idle_usd)
    assert both.hardware_usd == pytest.approx(first.hardware_usd + second.hardware_usd)
    assert both.total_usd == pytest.approx(first.total_usd + second.total_usd)


def test_a_life_of_work_costs_the_hardware_and_its_idle_energy() -> None:
    life_seconds = 3 * 365.25 * 86400
    parts = CostModel(CONFIG).parts(busy_seconds=life_seconds * 0.25, energy_joules=0)
    assert parts.hardware_usd == pytest.approx(800)
    assert parts.idle_usd == pytest.approx(25 * life_seconds * 0.75 / 3.6e6 * 0.30)


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
    [
        ("openai/gpt-4o-mni", "gpt-4o-mini"),
        ("opnai/gpt-4o", "openai"),
        ("openai/zzzz", "no model"),
        ("openai/text-embedding-3-small", "no price for its output tokens"),
    ],
)
def test_models_that_cannot_be_priced_are_refused_with_a_hint(reference: str, hint: str) -> None:
    with pytest.raises(UnknownModel, match=hint) as caught:
        PriceBook([reference])
    assert f"cost.compare_to: '{reference}'" in str(caught.value)


def test_every_name_that_genai_prices_lists_can_be_looked_up() -> None:
    for provider in get_snapshot().providers:
        for model in provider.models:
            with contextlib.suppress(UnknownModel):
                PriceBook([f"{provider.id}/{model.id}"])
                continue
            with pytest.raises(UnknownModel, match="has no price for"):
                PriceBook([f"{provider.id}/{model.id}"])


def test_the_verdict_can_say_that_the_api_is_cheaper() -> None:
    book = PriceBook(CONFIG.compare_to)
    dear = CONFIG.model_copy(update={"hardware_price_usd": 1e7})
    assert "every compared API is cheaper than this rig" in verdict(compare(TRAFFIC, dear, book))
    cheap = CONFIG.model_copy(update={"hardware_price_usd": 0.0, "electricity_usd_per_kwh": 1e-9})
    text = verdict(compare(TRAFFIC, cheap, book))
    assert "cheaper than every compared API" in text
    assert "95 % cheaper, holds against all" in text
    assert "nothing to compare" in verdict(compare(TRAFFIC, CONFIG, PriceBook(())))


@pytest.mark.parametrize("width", [80, 100])
def test_the_printed_report_holds_what_a_person_needs(width: int) -> None:
    text = printed(compare(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to)), width)
    assert max(map(len, text.splitlines())) <= width
    for figure in (
        "100 requests", "7,800 prompt tokens (0 cached)", "12,800 generated",
        "5.0 s prefill, 70.0 s decode", "7,125 J", "$800 over 3 years at 25% utilization", "$0.30/kWh",
        "25 W idle", "this rig, energy only", "this rig, all costs", "openai/gpt-4o-mini",
        "$0.031", "$0.26", "$0.00059", "Verdict:",
    ):  # fmt: skip
        assert figure in " ".join(text.split()), figure


def test_estimates_are_labelled() -> None:
    book = PriceBook(CONFIG.compare_to)
    measured = dataclasses.replace(TRAFFIC, energy_source="nvml")
    for traffic, labelled in ((TRAFFIC, True), (measured, False)):
        text = printed(compare(traffic, CONFIG, book), 100)
        assert ("this rig: estimated" in text) == labelled
        assert ("rest on estimates" in text) == labelled


def printed(report: CostReport, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(report))
    return console.export_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.0, "$0.00"), (1234.5, "$1,234.50"), (0.26232, "$0.26"), (0.0099, "$0.0099"),
        (0.00000312, "$0.0000031"),
    ],
)  # fmt: skip
def test_prices_read_as_prices(value: float | None, text: str) -> None:
    assert usd_text(value) == text


@pytest.mark.parametrize(
    ("percent", "text"),
    [
        (None, "-"), (59.35, "59.3 %"), (94.96, "94.9 %"), (99.99, "99.9 %"), (100.0, "100.0 %"),
        (-0.5, "LOSS 0.5 %"), (-107.2, "LOSS 107 %"),
    ],
)  # fmt: skip
def test_savings_never_read_as_more_than_they_are(percent: float | None, text: str) -> None:
    assert saving_text(percent) == text


def test_a_report_is_plain_json() -> None:
    report = compare(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to))
    assert json.loads(json.dumps(dataclasses.asdict(report)))["traffic"]["requests"] == 100


@given(st.integers(0, 400_000), st.floats(0, 1), st.integers(0, 100_000))
@settings(max_examples=30)
def test_prices_are_those_of_the_package(prompt: int, cached_share: float, completion: int) -> None:
    references = load_config(Path(__file__).parents[2] / "configs/default.yaml").cost.compare_to
    book, cached = PriceBook(references), int(prompt * cached_share)
    usage = Usage(input_tokens=prompt, cache_read_tokens=cached, output_tokens=completion)
    for reference in references:
        provider, _, model = reference.partition("/")
        expected = float(calc_price(usage, model, provider_id=provider).total_price)
        assert book.usd(reference, prompt, cached, completion) == pytest.approx(expected)
