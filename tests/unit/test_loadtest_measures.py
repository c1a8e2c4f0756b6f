"""What the load test measures, against hand-made records, NumPy and simulations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.gate import (
    GateError,
    compare_runs,
    judge,
    load_baseline,
    parse_objective,
    wilson,
)
from loadtest.knee import KneeSearch
from loadtest.measures import (
    by_tenant,
    inter_token,
    keeps,
    marked,
    summarize,
    tokens_over_time,
)
from loadtest.options import BenchOptions
from loadtest.pricing import EnergyReading, energy_notes, traffic_of
from loadtest.records import RequestRecord, read_records, write_records
from loadtest.report import Report, StageReport
from loadtest.scenario import Scenario, Slo, Sweep
from loadtest.stages import Stage
from loadtest.statistics import (
    batch_interval,
    compared,
    distribution,
    order_statistics,
    student_t,
    weighted_distribution,
)
from loadtest.watch import WatchSample, health
from serving.config import CostConfig
from serving.cost.comparison import compare
from serving.cost.prices import PriceBook

COST = CostConfig(compare_to=("openai/gpt-4o-mini", "openai/gpt-4o"))
WINDOW = (0.0, 10.0)


def record(**fields: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "number": 0, "user": 0, "warmup": False, "started_at": 1.0, "sent_at": 1.0, "ended_at": 3.0,
        "first_token_at": 1.5, "chunk_gaps_seconds": [0.5, 0.5, 0.25], "prompt_tokens": 10,
        "cached_tokens": 2, "completion_tokens": 4, "finish_reason": "stop", "measured": True,
    }  # fmt: skip
    return RequestRecord(**(base | fields))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles_are_numpys(values: list[float]) -> None:
    plain = distribution(values)
    weighted = weighted_distribution([(np.array(values), np.ones(len(values)))])
    for result in (plain, weighted):
        assert result is not None
        for percent, value in ((50, result.p50), (90, result.p90), (99, result.p99)):
            assert value == pytest.approx(np.percentile(values, percent), abs=1e-6)
        assert result.mean == pytest.approx(np.mean(values), abs=1e-6)
        assert (result.minimum, result.maximum) == (min(values), max(values))


@pytest.mark.parametrize(("count", "percent"), [(40, 50), (200, 90), (3000, 95)])
def test_intervals_hold_the_truth_as_often_as_they_say(count: int, percent: int) -> None:
    rng = np.random.default_rng(7)
    truth = -np.log(1 - percent / 100)  # of the exponential distribution
    low, high = order_statistics(count, percent / 100)
    assert low is not None
    assert high is not None
    ordered = np.sort(rng.exponential(size=(2000, count)), axis=1)
    held = np.mean((ordered[:, low] <= truth) & (truth <= ordered[:, high]))
    assert 0.94 <= held <= 0.995


def test_an_interval_that_few_values_leave_open_is_open() -> None:
    assert order_statistics(20, 0.99)[1] is None
    assert order_statistics(1, 0.5) == (None, None)
    assert distribution([]) is None


def test_values_of_one_request_are_no_independent_witnesses() -> None:
    """With all variance between requests, 100 values of each are worth one."""
    rng = np.random.default_rng(2)
    groups = [(np.full(100, level), np.ones(100)) for level in rng.exponential(size=30)]
    together = weighted_distribution(groups)
    apart = distribution(np.concatenate([values for values, _ in groups]))
    assert together is not None
    assert apart is not None
    width = np.diff(np.array(together.intervals["p50"], dtype=float))[0]
    naive = np.diff(np.array(apart.intervals["p50"], dtype=float))[0]
    assert width > 2 * naive


@pytest.mark.parametrize("count", [3, 6, 25, 120])
def test_intervals_of_tokens_hold_the_truth_however_few_requests_they_are_of(count: int) -> None:
    """Thirty gaps a request, of which all are longer in one request than in another."""
    rng = np.random.default_rng(5)

    def gaps(requests: int) -> Any:
        levels = rng.lognormal(0, 0.4, requests)
        return levels[:, None] * rng.lognormal(0, 0.3, (requests, 30))

    many = gaps(20_000)
    truth = {"mean": many.mean()} | {f"p{p}": np.percentile(many, p) for p in (50, 90, 95, 99)}
    held = dict.fromkeys(truth, 0)
    for _ in range(200):
        found = weighted_distribution([(values, np.ones(30)) for values in gaps(count)])
        assert found is not None
        for name, value in truth.items():
            low, high = found.intervals[name]
            held[name] += (low is None or low <= value) and (high is None or value <= high)
        assert found.intervals["p99"][1] is None or count >= 25
    assert min(held.values()) >= 0.88 * 200, held


@pytest.mark.parametrize("count", [2, 4, 12])
def test_the_mean_of_few_is_as_uncertain_as_it_is(count: int) -> None:
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(1000):
        found = distribution(rng.normal(5, 1, count))
        assert found is not None
        low, high = found.intervals["mean"]
        assert low is not None
        assert high is not None
        held += low <= 5 <= high
    assert 930 <= held <= 970


def test_students_t_is_the_tables() -> None:
    for freedom, value in (
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (5, 2.571),
        (9, 2.262),
        (30, 2.042),
    ):
        assert student_t(freedom) == pytest.approx(value, rel=0.0015)
    for freedom, value in ((1, 63.657), (2, 9.925), (3, 5.841), (9, 3.250), (30, 2.750)):
        assert student_t(freedom, 0.99) == pytest.approx(value, rel=0.01)


def test_batch_means_hold_the_truth() -> None:
    rng = random.Random(4)
    held = 0
    for _ in range(1000):
        low, high = batch_interval([rng.gauss(5, 1) for _ in range(10)])
        assert low is not None
        assert high is not None
        held += low <= 5 <= high
    assert 920 <= held <= 980


def test_latencies_by_hand() -> None:
    one = record(started_at=0.75)
    assert one.ttft_seconds == 0.75, "from when it was due, not from when it was sent"
    assert one.end_to_end_seconds == 2.25
    assert one.normalized_seconds == 2.25 / 4
    assert one.queue_seconds == 0.25
    assert record(timings={"queue_seconds": 0.5}).queue_seconds == 0.5
    assert one.tpot_seconds == pytest.approx(1.25 / 3)
    assert record(first_token_at=None).ttft_seconds is None
    assert record(completion_tokens=1).tpot_seconds is None


def test_a_chunk_of_several_tokens_weighs_as_many() -> None:
    # A chunk of 1, after 0.3 s one of 3, after 0.1 s one of 1: four latencies, all of 0.1 s.
    one = record(chunk_gaps_seconds=[0.3, 0.1], chunk_tokens=[1.0, 3.0, 1.0], completion_tokens=5)
    values, weights = inter_token(one)
    assert values == pytest.approx([0.1, 0.1])
    assert list(weights) == [3.0, 1.0]
    found = summarize([one], WINDOW, Slo()).itl_seconds
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert found.p50 == pytest.approx(0.1)
    assert found.mean == pytest.approx(one.tpot_seconds)


def test_the_window_decides_what_is_measured() -> None:
    stages = [Stage(0, 0.0, 10.0, users=2), Stage(1, 10.0, 20.0, users=4)]
    records = [
        record(number=3, started_at=0.5, stage=0),  # warm-up
        record(number=2, started_at=1.0, stage=0),
        record(number=1, started_at=8.9, ended_at=15.0, stage=0),
        record(number=0, started_at=9.0, stage=0),  # cool-down
        record(number=4, started_at=11.0, stage=1),
        record(number=-1, started_at=5.0, stage=0, warmup=True),
    ]
    result = marked(records, stages)
    assert [one.number for one in result if one.measured] == [1, 2, 4]
    assert all(one.measured for one in records), "what was given stays as it was"


def test_a_summary_by_hand() -> None:
    records = [
        record(warmup=True, measured=False),
        record(),
        record(
            user=1, started_at=2.0, sent_at=2.0, first_token_at=2.5, ended_at=11.0,
            chunk_gaps_seconds=[1.0, 6.0, 1.0], completion_tokens=4, cached_tokens=3,
        ),
        record(measured=False, started_at=9.5, first_token_at=9.9, ended_at=10.5, chunk_gaps_seconds=[0.2]),
        record(error="http_503", error_message="full", first_token_at=None, completion_tokens=None),
    ]  # fmt: skip
    records[3].completion_tokens = 2
    summary = summarize(records, WINDOW, Slo(ttft_ms=600, end_to_end_ms=5000))
    assert (summary.totals.requests, summary.totals.errors) == (3, 1)
    # Four, three of four, one of two: as they arrived within the ten seconds, whoever they belong to.
    assert summary.completion_tokens_per_second == pytest.approx(0.8)
    assert summary.requests_per_second == pytest.approx(0.1)
    assert summary.prompt_tokens_per_second == pytest.approx(3.0)
    assert summary.cached_share == pytest.approx(5 / 20)
    assert summary.completion_tokens_per_second_per_user == pytest.approx((4 / 2 + 4 / 9) / 2)
    assert summary.error_classes == {"http_503": 1}
    assert summary.first_error == "full"
    assert summary.ttft_seconds is not None
    assert summary.ttft_seconds.count == 2
    assert summary.goodput is not None
    assert summary.goodput.requests_per_second == pytest.approx(0.1)
    assert summary.goodput.share == pytest.approx(1 / 3)
    assert summarize(records, WINDOW, Slo()).goodput is None


def test_tokens_of_a_stage_before_count_where_they_arrive() -> None:
    """In a staircase there is no pause: what the first step began still streams in the second one's window."""
    long = record(
        started_at=9.0, first_token_at=9.5, ended_at=15.0, chunk_gaps_seconds=[2.0, 2.0, 1.5],
        completion_tokens=4, stage=0, measured=False,
    )  # fmt: skip
    own = record(started_at=12.0, first_token_at=12.5, ended_at=13.5, stage=1)
    second = summarize([record(), long, own], (11.0, 19.0), Slo())
    assert second.completion_tokens_per_second == pytest.approx((3 + 4) / 8)
    assert second.requests_per_second == pytest.approx(2 / 8)
    assert second.totals.requests == 1, "it is measured where it was due"


def test_what_keeps_an_slo() -> None:
    assert keeps(record(), Slo(ttft_ms=500, tpot_ms=417, end_to_end_ms=2000))
    for limits in (Slo(ttft_ms=499), Slo(tpot_ms=416), Slo(end_to_end_ms=1999)):
        assert not keeps(record(), limits)
    assert not keeps(record(error="http_500"), Slo())
    assert keeps(record(completion_tokens=1), Slo(tpot_ms=1)), "one token has no second one"


def test_tenants_are_measured_apart() -> None:
    records = [record(tenant="a"), record(tenant="b", first_token_at=2.0)]
    tenants = by_tenant(records, WINDOW, Slo())
    assert tenants["a"].ttft_seconds is not None
    assert tenants["a"].ttft_seconds.p50 == 0.5
    assert tenants["b"].ttft_seconds is not None
    assert tenants["b"].ttft_seconds.p50 == 1.0
    assert by_tenant(records[:1], WINDOW, Slo()) == {}


def test_unknown_tokens_are_not_invented() -> None:
    summary = summarize(
        [record(), record(completion_tokens=None, prompt_tokens=None)], WINDOW, Slo()
    )
    assert summary.totals.completion_tokens is None
    assert summary.completion_tokens_per_second is None
    assert traffic_of([record(completion_tokens=None)], None, None, COST) is None


def test_throughput_over_time_keeps_every_token() -> None:
    points = tokens_over_time([record(), record(first_token_at=4.0)], 0.0, 10.0, 8)
    width = points[1][0] - points[0][0]
    assert sum(rate * width for _, rate in points) == pytest.approx(8)


def test_records_come_back_from_their_file(tmp_path: Path) -> None:
    records = [record(chunk_tokens=[1.0, 2.0]), record(error="connection", first_token_at=None)]
    write_records(records, tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl") == records


def meter(joules: float, idle_joules: float = 0.0) -> EnergyReading:
    return EnergyReading({"nvml": joules}, {"nvml": idle_joules})


def test_traffic_uses_the_servers_meters_where_it_has_some() -> None:
    timings = {"prefill_busy_seconds": 0.25, "decode_busy_seconds": 1.0}
    measured = traffic_of([record(timings=timings)], meter(5.0), meter(25.0, 8.0), COST)
    assert measured is not None
    assert (measured.prefill_busy_seconds, measured.decode_busy_seconds) == (0.25, 1.0)
    assert (measured.energy_joules, measured.energy_source) == (20.0, "nvml")
    assert measured.idle_joules == 8.0
    assert not measured.estimated
    stood_still = traffic_of([record(timings=timings)], meter(5.0), meter(5.0), COST)
    assert stood_still is not None
    assert stood_still.energy_source == "estimated"
    assert stood_still.energy_joules == pytest.approx(1.25 * COST.power.load_watts)
    # Without them, or with another server's: two requests that overlap keep it busy for the time either is open.
    foreign = traffic_of(
        [
            record(timings={"prompt_ms": 3.0}),
            record(started_at=2.0, ended_at=4.0, first_token_at=2.5),
        ],
        None,
        None,
        COST,
    )
    assert foreign is not None
    assert foreign.busy_seconds == pytest.approx(3.0)
    assert foreign.energy_joules == pytest.approx(3.0 * COST.power.load_watts)
    assert foreign.estimated


def test_energy_that_is_others_too_is_said_so() -> None:
    before, after = EnergyReading({"nvml": 1.0}, {}, 10), EnergyReading({"nvml": 9.0}, {}, 15)
    assert energy_notes(before, after, 5) == []
    (note,) = energy_notes(before, after, 3)
    assert "2 requests of others" in note
    # Some of ours never reached it; and a server that tells nothing.
    assert energy_notes(before, after, 8) == energy_notes(None, None, 3) == []


def test_what_asked_for_flex_is_priced_as_flex() -> None:
    plain, flex = record(), record(number=1, service_tier="flex")
    cost = CostConfig(compare_to=("openai/gpt-5",))
    usd = {}
    for name, records in (("plain", [plain]), ("flex", [flex]), ("both", [plain, flex])):
        measured = traffic_of(records, None, None, cost)
        assert measured is not None
        usd[name] = compare(measured, cost, PriceBook(cost.compare_to)).rows[0].traffic_usd
    assert usd["flex"] == pytest.approx(usd["plain"] / 2)
    assert usd["both"] == pytest.approx(usd["plain"] + usd["flex"])


@pytest.mark.parametrize("capacity", [3, 11, 40])
def test_a_sweep_finds_the_knee_of_a_server_that_has_one(capacity: int) -> None:
    """A server of so many places: throughput rises by the user, then not at all."""
    rng = random.Random(capacity)
    search = KneeSearch(Sweep(kind="sweep", most=256, max_stages=12))
    tried = []
    while (load := search.next_load()) is not None:
        tried.append(load)
        search.saw(load, 10 * min(load, capacity) * rng.uniform(0.99, 1.01), 0.0)
    assert search.knee is not None
    assert 0.85 * capacity <= search.knee <= 1.35 * capacity
    assert len(tried) == len(set(tried)) <= 12


def test_a_sweep_is_not_ended_by_one_bad_stage() -> None:
    search = KneeSearch(Sweep(kind="sweep", most=64, max_stages=12))
    while (load := search.next_load()) is not None:
        search.saw(load, min(load, 16) * (0.4 if load == 2 else 1.0), 0.0)
    assert search.knee is not None
    assert 14 <= search.knee <= 16


def test_at_the_greatest_load_that_may_be_tried_one_stage_that_brings_nothing_is_enough() -> None:
    search = KneeSearch(Sweep(kind="sweep", most=64, max_stages=9))
    # As measured once: the gain before the last was just enough.
    seen = {1: 128.0, 2: 110.0, 4: 138.0, 8: 198.0, 16: 278.0, 32: 294.0, 64: 292.0, 11: 240.0}
    tried = []
    while (load := search.next_load()) is not None:
        tried.append(load)
        search.saw(load, seen.get(int(load), 270.0), 0.0)
    assert tried[:7] == [1, 2, 4, 8, 16, 32, 64]
    assert search.knee is not None
    assert 11 < search.knee <= 16


def test_a_sweep_that_never_saturates_has_no_knee() -> None:
    search = KneeSearch(Sweep(kind="sweep", most=8))
    while (load := search.next_load()) is not None:
        search.saw(load, load, 0.0)
    assert search.knee is None


@pytest.mark.parametrize("over", ["users", "requests_per_second"])
def test_a_load_at_which_requests_fail_is_no_knee_however_much_it_brings(over: Any) -> None:
    search = KneeSearch(Sweep(kind="sweep", over=over, start=1, most=64, max_stages=12))
    tried = []
    while (load := search.next_load()) is not None:
        assert load <= 8
        tried.append(load)
        search.saw(load, load, 0.5 if load > 5 else 0.0)
    assert search.knee is not None
    assert 4 < search.knee <= 5, "what lies between the last good load and the first bad is tried"
    assert len(tried) == len(set(tried)) <= 7


@pytest.mark.parametrize(
    ("errors", "told"), [(0, "less than 11% more"), (5, "more than 10% of the")]
)
def test_what_lies_beyond_the_knee_is_told(errors: int, told: str) -> None:
    stages = []
    for users, failed in ((4, 0), (8, errors)):
        records = [record(number=n, error="http_503" if n < failed else None) for n in range(10)]
        summary = summarize(records, WINDOW, Slo())
        stage = Stage(0, *WINDOW, users=users)
        stages.append(
            StageReport(stage, summary, {}, health([], [], WINDOW, None, due_times=False))
        )
    nothing: Any = None
    sweep = Scenario(load=Sweep(kind="sweep"))
    report = Report(
        options=BenchOptions("", "sweep", sweep, COST), model="tiny", started=nothing, host={}, notes=(),
        records=(), samples=(), stages=tuple(stages), knee=4.0, totals=nothing, totals_with_warmup=nothing,
        cost=None,
    )  # fmt: skip
    assert told in report.beyond_knee


def test_a_server_that_always_fails_has_no_knee() -> None:
    search = KneeSearch(Sweep(kind="sweep", most=64))
    while (load := search.next_load()) is not None:
        search.saw(load, 0.0, 1.0)
    assert search.knee is None


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("ttft p50 < 600ms", True), ("ttft p95 < 0.4s", False), ("tokens/s >= 0.4", True),
        ("requests/s > 5", False), ("errors < 30%", False), ("errors <= 0.5", True), ("goodput >= 50%", True),
        ("e2e mean<2s", False), ("queue p99 <= 0ms", True),
    ],
)  # fmt: skip
def test_objectives_hold_or_do_not(text: str, passes: bool) -> None:
    failed = record(error="http_503", first_token_at=None, started_at=4.0)
    summary = summarize([record(), failed], WINDOW, Slo(ttft_ms=600))
    verdict = judge(parse_objective(text), summary, "2 users")
    assert verdict.passed is passes
    assert "it is" in verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ttft < 3ms",
        "ttft p95 < 3",
        "tokens/s p95 > 3",
        "tokens/s > 3ms",
        "speed > 3",
        "errors < 3ms",
    ],
)
def test_objectives_that_make_no_sense_are_told(text: str) -> None:
    with pytest.raises(GateError, match="--slo"):
        parse_objective(text)


def test_an_objective_that_so_few_values_cannot_prove_is_said_so() -> None:
    few = [record(number=number, first_token_at=1.4 + number / 100) for number in range(5)]
    verdict = judge(parse_objective("ttft p99 < 1s"), summarize(few, WINDOW, Slo()), "2 users")
    assert verdict.passed
    assert "may be anything from 430.0 ms to ? (95 %)" in verdict.reason


def test_what_is_not_measured_keeps_no_objective() -> None:
    verdict = judge(parse_objective("ttft p95 < 1s"), summarize([], WINDOW, Slo()), "2 users")
    assert not verdict.passed


def test_shares_have_wilsons_interval() -> None:
    # Example of Newcombe (1998): 81 of 263.
    low, high = wilson(81, 263)
    assert low == pytest.approx(0.2553, abs=1e-4)
    assert high == pytest.approx(0.3662, abs=1e-4)


def run_of(seed: int, slower: float, errors: int = 0) -> dict[str, Any]:
    """A report of 300 requests in ten seconds with noise of 20 %."""
    rng = random.Random(seed)
    requests = []
    for number in range(300):
        noise = rng.lognormvariate(0, 0.2) * slower
        requests.append(
            {
                "stage": 0, "measured": True, "error": None, "started_at": number / 30,
                "ttft_seconds": 0.1 * noise, "tpot_seconds": 0.02 * noise, "end_to_end_seconds": noise,
                "completion_tokens": 50,
            }
        )  # fmt: skip
    totals = {"requests": 300 + errors, "errors": errors}
    stage = {
        "index": 0, "label": "8 users", "users": 8, "window": [0.0, 10.0], "summary": {"totals": totals},
        "arrivals": "poisson", "burstiness": 1.0,
    }  # fmt: skip
    return {
        "version": 2, "started": "2026-11-26T10:00", "model": "tiny", "stages": [stage], "requests": requests,
        "scenario": {"traffic": [], "slo": {}, "load": {"kind": "closed", "users": 8}},
    }  # fmt: skip


def test_noise_is_no_regression_and_a_regression_is_no_noise() -> None:
    before = run_of(0, 1.0)
    for seed in range(1, 11):
        assert all(v.passed for v in compare_runs(run_of(seed, 1.0), before, "b").verdicts)
        slower = compare_runs(run_of(seed, 1.25), before, "b")
        failed = {verdict.subject for verdict in slower.verdicts if not verdict.passed}
        assert "TTFT p50 (8 users)" in failed
        faster = compare_runs(run_of(seed, 0.8), before, "b")
        assert all(verdict.passed for verdict in faster.verdicts)
        assert any(change.better for _, changes in faster.stages for change in changes)


@pytest.mark.parametrize("count", [3, 10])
def test_a_ratio_of_few_batches_is_as_uncertain_as_it_is(count: int) -> None:
    """99 % intervals of the same server twice, in which whole stretches of time are slower than others."""
    rng = np.random.default_rng(8)

    def batches() -> list[Any]:
        return [rng.lognormal(0, 0.15) * rng.lognormal(0, 0.3, 10) for _ in range(count)]

    held = 0
    for _ in range(150):
        found = compared(batches(), batches(), np.mean, draws=300)
        assert found is not None
        held += found[1] <= 1 <= found[2]
    assert held >= 145


def test_more_failures_are_a_regression() -> None:
    before = run_of(0, 1.0)
    assert all(v.passed for v in compare_runs(run_of(1, 1.0, errors=1), before, "b").verdicts)
    failed = [
        v for v in compare_runs(run_of(1, 1.0, errors=20), before, "b").verdicts if not v.passed
    ]
    assert [verdict.subject for verdict in failed] == ["failed requests (8 users)"]


def test_a_baseline_that_tells_nothing_is_no_pass() -> None:
    short = run_of(1, 1.0)
    short["requests"] = short["requests"][:20]  # of one tenth of the window
    with pytest.raises(GateError, match="at 8 users one of the runs has too few requests"):
        compare_runs(short, run_of(0, 1.0), "b")
    nothing_worked = run_of(1, 1.0, errors=300) | {"requests": []}
    verdicts = compare_runs(nothing_worked, run_of(0, 1.0), "b").verdicts
    assert [v.subject for v in verdicts if not v.passed][-1] == "failed requests (8 users)"


def test_only_like_is_compared_with_like(tmp_path: Path) -> None:
    other = run_of(0, 1.0) | {"scenario": {"traffic": [{"tenant": "x"}], "slo": {}}}
    with pytest.raises(GateError, match="'traffic' is another"):
        compare_runs(run_of(0, 1.0), other, "b")
    relabelled = run_of(0, 1.0)
    relabelled["stages"][0]["label"] = "9 users"
    with pytest.raises(GateError, match="none of these loads: 8 users"):
        compare_runs(run_of(0, 1.0), relabelled, "b")
    traces = [run_of(0, 1.0) for _ in range(2)]
    for run, trace in zip(traces, ("a.csv", "b.csv"), strict=True):
        run["scenario"]["load"] = {"kind": "replay", "trace": trace}
    with pytest.raises(GateError, match="'load' is another"):
        compare_runs(traces[0], traces[1], "b")
    rates = [run_of(0, 1.0) for _ in range(2)]
    for run, arrivals in zip(rates, ("poisson", "constant"), strict=True):
        run["stages"][0] |= {"users": None, "arrivals": arrivals}
    with pytest.raises(GateError, match="its arrivals was constant, not poisson"):
        compare_runs(rates[0], rates[1], "b")
    for text in ("{oops", "[]", json.dumps({"version": 1})):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(GateError, match="--baseline"):
            load_baseline(tmp_path / "b.json", 2)


def samples(cpu: float, lag: float) -> list[WatchSample]:
    return [WatchSample(second + 1.0, 0, cpu, lag, 2 * lag) for second in range(10)]


def test_a_client_that_held_up_says_so() -> None:
    good = health(samples(0.5, 0.001), [record()], WINDOW, 0.03, due_times=True)
    assert good.limits == ()
    assert good.cpu_share == pytest.approx(0.5)
    for bad, why in (
        (health(samples(0.95, 0.001), [record()], WINDOW, 0.03, due_times=True), "more --workers"),
        (health(samples(0.5, 0.02), [record()], WINDOW, 0.03, due_times=True), "event loop"),
        (health(samples(0.5, 0.0), [record(sent_at=1.2)], WINDOW, 0.03, due_times=True), "after they were due"),
        (health(samples(0.5, 0.0), [record(error="client_limit")], WINDOW, 0.03, due_times=True), "ulimit"),
    ):  # fmt: skip
        assert len(bad.limits) == 1
        assert why in bad.limits[0]
