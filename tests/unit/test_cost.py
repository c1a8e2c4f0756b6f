"""The cost model's equations, commercial prices, and the comparison of the two."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from serving.config import CostConfig, PowerConfig, load_config
from serving.cost.comparison import CostReport, compare
from serving.cost.model import CostModel
from serving.cost.money import USD, Currency, saving_text
from serving.cost.peers import suggest_peers
from serving.cost.price_data import PriceData, PriceDataError, installed, price_data, update
from serving.cost.prices import PriceBook, UnknownModel
from serving.cost.render import render
from serving.cost.traffic import TokenGroup, Traffic
from serving.cost.uncertainty import Figure, combined, figures_of, swings, varied
from serving.cost.verdict import usd_here, usd_there, verdict_on
from serving.cost.words import (
    Step,
    computation,
    computation_of_verdict,
    computation_there,
    verdict_text,
)
from tests.unit.test_wall import device

COST_MODEL = Path(__file__).parents[2] / "docs" / "cost-model.md"
CONFIG = CostConfig(
    hardware_price_usd=800,
    lifetime_years=3,
    utilization=0.25,
    electricity_usd_per_kwh=0.30,
    power=PowerConfig(idle_watts=25, load_watts=95),
    compare_to=("openai/gpt-4o-mini", "openai/gpt-4o"),
)
BEGIN = 1_790_000_000.0


def traffic(
    *,
    requests: int = 100,
    prompt: int = 7_800,
    cached: int = 0,
    completion: int = 12_800,
    **more: Any,
) -> Traffic:
    """So many requests, all alike."""
    fields: dict[str, Any] = {
        "prefill_busy_seconds": 5.0, "decode_busy_seconds": 70.0, "energy_joules": 7_125.0,
        "idle_joules": 1_875.0, "energy_source": "estimated", "timing_source": "engine",
    }  # fmt: skip
    group = TokenGroup(
        BEGIN, prompt // requests - 1, "default", requests, prompt, cached, completion
    )
    return Traffic(
        requests=requests, prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion,
        groups=(group,), **(fields | more),
    )  # fmt: skip


TRAFFIC = traffic()


def worked_example() -> dict[str, float]:
    """The table at the end of the document: each figure's name, without its formula, and value."""
    table = COST_MODEL.read_text(encoding="utf-8").partition("## A worked example")[2]
    rows = re.findall(r"^\| (.+?)(?: = .+?| at .+?)? \| ([\d.]+) \|", table, re.MULTILINE)
    return {name.replace("`", ""): float(value) for name, value in rows}


GIVEN = (
    "hardware_price_usd", "resale_usd", "lifetime_years", "maintenance_share_per_year", "utilization",
    "electricity_usd_per_kwh", "cooling_overhead",
)  # fmt: skip


def test_the_worked_example_of_the_docs() -> None:
    stated = worked_example()
    reference = "ours/example"
    config = CostConfig.model_validate(
        {name: stated[name] for name in GIVEN}
        | {
            "power": {"idle_watts": stated["idle_watts"], "load_watts": stated["load_watts"]},
            "prices": {reference: {"input": 0.15, "output": 0.60}},
            "ranges": {"utilization": [0.125, 0.5], "electricity_usd_per_kwh": [0.24, 0.375]},
        }
    )
    prefill, decode = stated["prefill_busy_seconds"], stated["decode_busy_seconds"]
    joules = (prefill + decode) * stated["load_watts"]
    measured = traffic(
        prompt=int(stated["prompt_tokens"]), completion=int(stated["completion_tokens"]),
        prefill_busy_seconds=prefill, decode_busy_seconds=decode, energy_joules=joules,
        idle_joules=(prefill + decode) * stated["idle_watts"],
    )  # fmt: skip
    report = compare(measured, config, PriceBook([reference], overrides=config.prices))
    parts, row, verdict = report.parts, report.rows[0], report.verdict
    assert verdict is not None
    computed = {
        "joules": joules,
        "idle_joules": measured.idle_joules,
        "energy_usd": parts.energy_usd,
        "marginal_usd": report.here_marginal.traffic_usd,
        "hardware_usd": parts.hardware_usd,
        "idle_usd": parts.idle_usd,
        "all costs": report.here_fully_loaded.traffic_usd,
        "usd_there": row.traffic_usd,
        "as run, saving_percent": row.saving_percent_as_run,
        "all costs, saving_percent": row.saving_percent_fully_loaded,
        "break_even_utilization": verdict.break_even_utilization,
        "break_even_tokens_per_day": verdict.break_even_tokens_per_day,
        "payback_months": verdict.payback_months,
    }
    for name, here in (
        ("marginal", report.here_marginal),
        ("as run", report.here_as_run),
        ("all costs", report.here_fully_loaded),
    ):
        computed[f"{name}, input_usd_per_million"] = here.input_usd_per_million
        computed[f"{name}, output_usd_per_million"] = here.output_usd_per_million
    figures = {each.name: each for each in figures_of(config, "nvml")}
    ranged = [figures["utilization"], figures["electricity_usd_per_kwh"]]
    moved = swings(ranged, lambda figure, value: usd_here(measured, varied(config, figure, value)))
    for name, figure in (("utilization", ranged[0]), ("electricity", ranged[1])):
        swing = next(each for each in moved if each.figure == figure)
        computed[f"usd_here, {name} {figure.low:g}"] = swing.at_low
        computed[f"usd_here, {name} {figure.high:g}"] = swing.at_high
    interval = combined(report.here_fully_loaded.traffic_usd, moved)
    computed["low end of both ranges"] = interval.low
    computed["high end of both ranges"] = interval.high
    assert {name: stated[name] for name in computed} == pytest.approx(computed, rel=5e-5)
    assert len(stated) == len(computed) + 13  # and nothing stands there that is not checked


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
    measured = traffic(
        prefill_busy_seconds=prefill, decode_busy_seconds=decode, prompt=prompt,
        completion=completion, energy_joules=joules, idle_joules=joules / 3,
    )  # fmt: skip
    report = compare(measured, CONFIG, PriceBook(()))
    for price in (report.here_marginal, report.here_as_run, report.here_fully_loaded):
        assert price.input_usd_per_million is not None
        assert price.output_usd_per_million is not None
        total = (
            price.input_usd_per_million * prompt + price.output_usd_per_million * completion
        ) / 1e6
        assert total == pytest.approx(price.traffic_usd)


def test_traffic_without_output_has_no_output_price() -> None:
    report = compare(traffic(completion=0), CONFIG, PriceBook(()))
    assert report.here_as_run.output_usd_per_million is None


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
    many = traffic(requests=1000, prompt=300_000, completion=0)
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
    report = compare(TRAFFIC, dear, book)
    assert report.verdict is not None
    assert (report.verdict.cheaper_here, report.verdict.claim_holds) == ("no", "no")
    assert report.verdict.payback_months is None or report.verdict.payback_months > 36
    text = verdict_text(report)
    assert "The API is cheaper" in text
    assert "does not hold here" in text
    cheap = CONFIG.model_copy(update={"hardware_price_usd": 0.0, "electricity_usd_per_kwh": 1e-9})
    text = verdict_text(compare(TRAFFIC, cheap, book))
    assert "This rig is cheaper" in text
    assert "95 % cheaper, holds" in text
    energy_alone = CONFIG.model_copy(update={"electricity_usd_per_kwh": 1e4})
    text = verdict_text(compare(TRAFFIC, energy_alone, book))
    assert "There is no break-even" in text
    assert "would not at any utilization" in text
    assert "nothing to compare" in verdict_text(compare(TRAFFIC, CONFIG, PriceBook(())))


def test_what_is_too_uncertain_is_said_so() -> None:
    even = verdict_on(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to), CONFIG.compare_to[0])
    assert even is not None
    assert even.break_even_utilization is not None
    config = CONFIG.model_copy(update={"utilization": even.break_even_utilization})
    report = compare(TRAFFIC, config, PriceBook(CONFIG.compare_to))
    assert report.verdict is not None
    assert report.verdict.saving_percent.value == pytest.approx(0, abs=1e-6)
    assert report.verdict.cheaper_here == "open"
    assert "too close to tell" in verdict_text(report)


def test_at_break_even_both_cost_the_same() -> None:
    book, reference = PriceBook(CONFIG.compare_to), CONFIG.compare_to[0]
    verdict = verdict_on(TRAFFIC, CONFIG, book, reference)
    assert verdict is not None
    for share, wanted in ((verdict.break_even_utilization, 1.0), (verdict.claim_utilization, 0.05)):
        if share is None or share > 1:
            continue
        config = CONFIG.model_copy(update={"utilization": share})
        there = usd_there(TRAFFIC, config, book, reference)
        assert usd_here(TRAFFIC, config) == pytest.approx(wanted * there)
    assert verdict.break_even_tokens_per_day is not None
    # A day of so many tokens: its API bill is the day's share of the hardware, idle energy and work.
    times = verdict.break_even_tokens_per_day / TRAFFIC.tokens
    api_usd = times * usd_there(TRAFFIC, CONFIG, book, reference)
    idle_seconds = 86_400 - times * TRAFFIC.busy_seconds
    energy_joules = times * TRAFFIC.energy_joules + idle_seconds * 25
    assert api_usd == pytest.approx(800 / (3 * 365.25) + energy_joules / 3.6e6 * 0.30)


def test_payback_is_when_the_saved_bills_have_paid_for_the_rig() -> None:
    book, reference = PriceBook(("openai/gpt-4o",)), "openai/gpt-4o"
    config = CONFIG.model_copy(update={"maintenance_share_per_year": 0.1})
    verdict = verdict_on(TRAFFIC, config, book, reference)
    assert verdict is not None
    assert verdict.payback_months is not None
    seconds = verdict.payback_months / 12 * 365.25 * 86_400
    times = 0.25 * seconds / TRAFFIC.busy_seconds
    bills = times * usd_there(TRAFFIC, config, book, reference)
    joules = times * TRAFFIC.energy_joules + 0.75 * seconds * 25
    running = joules / 3.6e6 * 0.30 + 80 * verdict.payback_months / 12
    assert bills - running == pytest.approx(800)


def test_a_range_is_moved_through_by_itself() -> None:
    config = CostConfig.model_validate(
        {"compare_to": ["openai/gpt-4o"], "ranges": {"utilization": [0.2, 0.5]}}
    )
    verdict = verdict_on(TRAFFIC, config, PriceBook(config.compare_to), "openai/gpt-4o")
    assert verdict is not None
    swing = next(each for each in verdict.tornado if each.figure.name == "utilization")
    assert swing.figure.basis == "yours"
    for share, percent in ((0.2, swing.at_low), (0.5, swing.at_high)):
        moved = config.model_copy(update={"utilization": share})
        there = usd_there(TRAFFIC, moved, PriceBook(config.compare_to), "openai/gpt-4o")
        assert percent == pytest.approx(100 * (1 - usd_here(TRAFFIC, moved) / there))
    assert [each.width for each in verdict.tornado] == sorted(
        (each.width for each in verdict.tornado), reverse=True
    )


def test_intervals_are_nearly_those_of_a_monte_carlo_simulation() -> None:
    """GUM's law of propagation, in logarithms, against its Supplement 1: the same figures, drawn at random."""
    config = CONFIG.model_copy(update={"compare_to": ("openai/gpt-4o-mini",)})
    book, reference = PriceBook(config.compare_to), config.compare_to[0]
    verdict = verdict_on(TRAFFIC, config, book, reference)
    assert verdict is not None
    figures = figures_of(config, TRAFFIC.energy_source)
    chance = np.random.default_rng(0)

    def drawn(figure: Figure) -> float:
        # Half of the draws on each side, by a normal law whose 90 % are the range; shares end at 1.
        side = figure.low if chance.random() < 0.5 else figure.high
        away = abs(float(chance.standard_normal())) / 1.645
        if figure.value and figure.low > 0:
            value = figure.value * (side / figure.value) ** away
        else:
            value = figure.value + (side - figure.value) * away
        most = 1.0 if figure.name in ("utilization", "cache_hits_there") else math.inf
        return float(min(max(value, 0.0), most))

    ratios = []
    for _ in range(4_000):
        moved, factor = config, 1.0
        for figure in figures:
            value = drawn(figure)
            moved, factor = (
                varied(moved, figure, value),
                value if figure.name == "energy" else factor,
            )
        here = usd_here(TRAFFIC, moved, factor)
        ratios.append(here / usd_there(TRAFFIC, moved, book, reference))
    low, high = np.percentile(ratios, [5, 95])
    saving = verdict.saving_percent
    assert 1 - saving.high / 100 == pytest.approx(low, rel=0.12)
    assert 1 - saving.low / 100 == pytest.approx(high, rel=0.12)


@given(st.floats(0.02, 1), st.floats(0.001, 1e4), st.floats(0.0, 2.0))
@settings(max_examples=40)
def test_an_interval_holds_its_value_and_widens_with_each_range(
    share: float, price: float, electricity: float
) -> None:
    config = CONFIG.model_copy(
        update={
            "utilization": share, "hardware_price_usd": price, "electricity_usd_per_kwh": electricity,
        }
    )  # fmt: skip
    verdict = verdict_on(TRAFFIC, config, PriceBook(CONFIG.compare_to), CONFIG.compare_to[0])
    assert verdict is not None
    saving = verdict.saving_percent
    assert saving.low <= saving.value + 1e-9
    assert saving.value <= saving.high + 1e-9
    assert saving.high <= 100
    for swing in verdict.tornado:
        for end in (swing.at_low, swing.at_high):
            assert saving.low - 1e-6 <= end <= saving.high + 1e-6


@pytest.mark.parametrize("width", [80, 100])
def test_the_printed_report_holds_what_a_person_needs(width: int) -> None:
    text = printed(compare(TRAFFIC, CONFIG, PriceBook(CONFIG.compare_to)), width)
    assert max(map(len, text.splitlines())) <= width
    for figure in (
        "100 requests", "7,800 prompt tokens (0 cached)", "12,800 generated",
        "5.0 s prefill, 70.0 s decode", "7,125 J", "$800 over 3 years at 25% utilization", "$0.30/kWh",
        "25 W idle", "this rig, marginal", "this rig, as run", "this rig, all costs", "openai/gpt-4o-mini",
        "$0.031", "$0.26", "$0.00059", "Verdict:", "What the saving hangs on",
    ):  # fmt: skip
        assert figure in " ".join(text.split()), figure


def test_the_idle_draw_that_a_meter_saw_is_told_beside_the_assumed_one() -> None:
    book = PriceBook(CONFIG.compare_to)
    measured = traffic(energy_source="shelly", idle_joules=75 * 61.0)
    assert "25 W idle (shelly saw 61 W)" in printed(compare(measured, CONFIG, book), 200)
    assert "25 W idle, 95 W load" in printed(compare(TRAFFIC, CONFIG, book), 200)


def test_great_losses_leave_words_whole() -> None:
    dear = CONFIG.model_copy(update={"hardware_price_usd": 3e6, "tokens_there_per_token": 1.1})
    text = printed(compare(TRAFFIC, dear, PriceBook(CONFIG.compare_to)), 80)
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("utilization ", "electricity ", "1.1 tokens there for one here"):
        assert whole in text, text


def test_estimates_are_labelled() -> None:
    book = PriceBook(CONFIG.compare_to)
    for each, labelled in ((TRAFFIC, True), (traffic(energy_source="nvml"), False)):
        text = printed(compare(each, CONFIG, book), 100)
        assert ("this rig: estimated" in text) == labelled
        assert ("rest on estimates" in " ".join(text.split())) == labelled


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
    assert USD.text(value) == text


@pytest.mark.parametrize(
    ("percent", "text"),
    [
        (None, "-"), (59.35, "59.3 %"), (94.96, "94.9 %"), (99.99, "99.9 %"), (100.0, "100.0 %"),
        (-0.5, "LOSS 0.5 %"), (-107.2, "LOSS 107 %"),
    ],
)  # fmt: skip
def test_savings_never_read_as_more_than_they_are(percent: float | None, text: str) -> None:
    assert saving_text(percent) == text


def test_a_small_loss_does_not_read_as_none() -> None:
    book = PriceBook(CONFIG.compare_to)
    verdict = verdict_on(TRAFFIC, CONFIG, book, CONFIG.compare_to[0])
    assert verdict is not None
    assert verdict.break_even_utilization is not None
    even = verdict.break_even_utilization * 0.999
    text = verdict_text(compare(TRAFFIC, CONFIG.model_copy(update={"utilization": even}), book))
    assert re.search(r"the API is cheaper \(a saving of −0\.\d %\)", text), text


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


def calculated(steps: Iterable[Step]) -> dict[str, float]:
    """What a calculator makes of each formula as it is printed, which must be the amount beside it."""
    results: dict[str, float] = {}
    for step in steps:
        formula = step.formula
        for name, value in results.items():
            formula = formula.replace(name, repr(value))
        for text, meaning in (
            ("×", "*"),
            ("−", "-"),
            (" s", ""),
            (" W", ""),
            (" J", ""),
            (" prefill", ""),
            (" decode", ""),
            (" USD", ""),
            ("√", "sqrt"),
        ):
            formula = formula.replace(text, meaning)
        formula = re.sub(r"ln²(\([^)]*\))", r"log\1**2", formula)
        assert re.fullmatch(r"(exp|log|sqrt|[\d.e+*/() -])+", formula), formula
        results[step.name] = float(re.sub("[^0-9.e-]", "", step.result))
        value = eval(formula, {"exp": math.exp, "log": math.log, "sqrt": math.sqrt})
        assert value == pytest.approx(results[step.name], rel=1e-4), step
    return results


def test_every_amount_can_be_computed_from_what_is_printed() -> None:
    """A reviewer with a calculator: the formulas, as they are printed, give the amounts beside them."""
    config = CostConfig.model_validate(
        {
            "hardware_price_usd": "900 EUR", "currencies": {"EUR": 1.08}, "currency": "EUR", "resale_usd": 100,
            "maintenance_share_per_year": 0.02, "cooling_overhead": 1.2, "tokens_there_per_token": 1.1,
            "cache_hits_there": 0.5, "compare_to": ["openai/gpt-4o", "google/gemini-2.5-pro"],
            "tariff": [{"begin": "22:00", "end": "06:00", "usd_per_kwh": 0.1}],
        }
    )  # fmt: skip
    assert config.hardware_price_usd == pytest.approx(972)
    measured = traffic(cached=2_000, prompt=30_000_000)
    report = compare(measured, config, PriceBook(config.compare_to))
    assert report.verdict is not None
    steps = [
        *computation(report),
        *(step for row in report.rows for step in computation_there(row, report)),
        *computation_of_verdict(report, report.verdict),
    ]
    again = [step for step in steps if step.formula == "the same sums"]
    assert (len(steps), len(again)) == (62, 16)
    texts = calculated(step for step in steps if step not in again)
    assert report.here_fully_loaded.traffic_usd / 1.08 == pytest.approx(
        texts["all costs"], rel=1e-5
    )
    # The same sums, with the end of a range that is told in the place of a figure.
    labels = {each.label: each for each in figures_of(config, measured.energy_source)}
    for step in again:
        place, _, told = step.name.partition(", with ")
        figure = next(each for label, each in labels.items() if told.startswith(label))
        number = re.search(r"[\d.e-]*\d", told.removeprefix(figure.label))
        assert number is not None
        value = float(number[0])
        if told.endswith("%"):
            value /= 100
        if "EUR" in told:
            value *= 1.08
        moved = varied(config, figure, value)
        usd = {
            "here": usd_here(measured, moved, value if figure.name == "energy" else 1.0),
            "there": usd_there(measured, moved, PriceBook(moved.compare_to), moved.compare_to[0]),
        }[place]
        again_usd = usd / measured.tokens * 1e6 / 1.08
        assert float(step.result.removeprefix("EUR ")) == pytest.approx(again_usd, rel=2e-5), step


def test_night_power_is_cheaper_at_night() -> None:
    config = CostConfig.model_validate(
        {"tariff": [{"begin": "22:00", "end": "06:00", "usd_per_kwh": 0.1}]}
    )
    model = CostModel(config)
    midnight = time.mktime((2026, 6, 1, 0, 0, 0, 0, 0, -1))
    for hours, usd_per_kwh in ((0, 0.1), (5.99, 0.1), (6.01, 0.3), (21.9, 0.3), (22.1, 0.1)):
        energy = model.parts(1.0, 3.6e6, midnight + hours * 3600).energy_usd
        assert energy == pytest.approx(usd_per_kwh)
    assert model.mean_usd_per_kwh == pytest.approx((8 * 0.1 + 16 * 0.3) / 24)


def test_an_operators_own_price_counts() -> None:
    own = CostConfig.model_validate(
        {
            "compare_to": ["openai/gpt-4o", "ours/negotiated"],
            "prices": {"ours/negotiated": {"input": 1, "cached_input": 0.5, "output": 2}},
        }
    )
    book = PriceBook(own.compare_to, overrides=own.prices)
    assert book.usd("ours/negotiated", 1_000_000, 500_000, 1_000_000) == pytest.approx(2.75)
    assert "your own for ours/negotiated" in book.source


def test_batches_and_flex_cost_less_where_they_do() -> None:
    book = PriceBook(["openai/gpt-5", "openai/gpt-4o-mini"])
    full, flex, batch = (
        book.usd("openai/gpt-5", 1000, 0, 1000, tier) for tier in ("default", "flex", "batch")
    )
    assert flex == batch == pytest.approx(full / 2)
    # It is not sold as flex.
    assert book.usd("openai/gpt-4o-mini", 1000, 0, 0, "flex") == book.usd(
        "openai/gpt-4o-mini", 1000, 0, 0
    )


@pytest.mark.parametrize(
    ("model", "peer", "why"),
    [
        ("llama-3.1-8b", "llama", "the same weights"),
        ("Llama-3.3-70B-Instruct-Q4_K_M", "llama", "the same weights"),
        ("gpt-oss-20b", "openrouter/openai/gpt-oss-20b", "the same weights"),
        ("smollm2-135m", "openai/gpt-5-nano", "0.135 billion"),
        ("our-32b-tune", "openai/gpt-5-mini", "32 billion"),
        ("support-bot", "openai/gpt-5-nano", "does not tell its size"),
    ],
)
def test_peers_are_suggested_by_what_a_model_is(model: str, peer: str, why: str) -> None:
    references, basis = suggest_peers(model, installed())
    assert peer in references[0].lower()
    assert why in basis
    assert not any(":batch" in reference for reference in references)
    PriceBook(references)  # all of them have prices


def test_a_peer_that_newer_prices_lack_is_not_suggested() -> None:
    data = installed()
    lacking = PriceData([each for each in data.providers if each.id != "openai"], "newer")
    references, _ = suggest_peers("smollm2-135m", lacking)
    assert references == ("google/gemini-2.5-flash-lite",)


def test_prices_are_updated_only_when_asked(tmp_path: Path) -> None:
    raw = [
        {
            "id": "acme", "name": "Acme", "api_pattern": "https://acme\\.example",
            "models": [
                {
                    "id": "big", "match": {"equals": "big"},
                    "prices": {"input_mtok": {"base": 1, "tiers": [{"start": 1000, "price": 2}]}, "output_mtok": 3},
                }
            ],
        }
    ]  # fmt: skip
    assert price_data(tmp_path) is installed()
    with device({"/data.json": raw, "/wrong.json": {"no": "list"}}) as url:
        data = update(tmp_path, f"{url}/data.json")
        for bad in ("wrong.json", "gone.json"):
            with pytest.raises(PriceDataError, match="the ones in use stay"):
                update(tmp_path, f"{url}/{bad}")
    assert "fetched 20" in data.source
    book = PriceBook(["acme/big"], data=price_data(tmp_path))
    assert book.usd("acme/big", 1_000, 0, 0) == pytest.approx(0.001)
    assert book.usd("acme/big", 1_001, 0, 0) == pytest.approx(2 * 0.001001)
    assert book.cuts.prompt_tokens == (1_000,)
    (tmp_path / "prices.json").write_text("{}")
    with pytest.raises(PriceDataError, match="fetch it again"):
        price_data(tmp_path)


def test_amounts_are_shown_in_the_operators_currency() -> None:
    euro = Currency("EUR", 1.08)
    assert euro.text(1.08) == "EUR 1.00"
    assert euro.text(-0.0108) == "EUR -0.010"
    assert [USD.rate(price) for price in (None, 0.125, 10.0, 0.05, 0.0028)] == [
        "-",
        "$0.125",
        "$10.00",
        "$0.05",
        "$0.0028",
    ]
