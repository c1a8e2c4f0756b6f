"""Whole benches, in their own processes, against a small server."""

from __future__ import annotations

import csv
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import requests
from hypothesis import example, given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright

from loadtest import charts, curves
from loadtest.amounts import constant
from loadtest.options import BenchOptions, Join
from loadtest.records import read_records
from loadtest.run import run_bench, run_worker
from loadtest.scenario import Closed, Scenario, Traffic, load_scenario
from loadtest.schema import PATH, report_schema
from serving.config import CostConfig, load_config
from serving.cost.money import USD
from serving.cost.peers import suggest_peers
from serving.cost.price_data import installed
from serving.cost.words import Step
from serving.engines.launch import free_port
from tests.browser import browser
from tests.openai_server import JOULES_A_REQUEST, serving
from tests.processes import wait_for
from tests.unit.test_cost import calculated

COST = CostConfig(compare_to=("openai/gpt-4o-mini", "openai/gpt-4o"))
DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"


@given(
    st.lists(st.floats(0, 1e7), min_size=1, max_size=60),
    st.lists(st.floats(0, 1e5), min_size=1, max_size=60),
)
@example([0.0], [5e-324])
def test_charts_stay_within_their_frames(values: list[float], rates: list[float]) -> None:
    middle = sorted(values)[len(values) // 2]
    places = [str(number) for number in range(len(values))]
    line = curves.Curve("p50", values, [(value / 2, value * 2) for value in values])
    pairs = [(number + 0.5, rate) for number, rate in enumerate(rates)]
    drawings = (
        charts.area(pairs, "s", "tokens/s"),
        charts.timeline([(0, 0.0, v / 2, v, False) for v in values], "seconds"),
        curves.histogram(values, {50: middle}, "ms"),
        curves.over_categories(places, [line], "users", "ms", mark=0),
        curves.trade_off([("x", value, value) for value in values], "tokens/s", "s"),
        curves.heat_map(pairs, len(rates) + 1.0, "s", "ms"),
        curves.over_time([("p50", pairs)], "ms"),
    )
    for drawing in drawings:
        box = re.search(r'viewBox="0 0 (\d+) (\d+)"', drawing)
        assert box is not None
        width, height = int(box[1]), int(box[2])
        for points in re.findall(r'points="([^"]+)"', drawing):
            for point in points.split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height
        assert all(0 <= float(x) <= width for x in re.findall(r' c?x[12]?="([^"]+)"', drawing))
        assert all(0 <= float(y) <= height for y in re.findall(r' c?y[12]?="([^"]+)"', drawing))


def test_a_timeline_of_very_many_requests_stays_small() -> None:
    drawing = charts.timeline([(0, n, n + 0.4, n + 1.0, False) for n in range(100_000)], "s")
    assert 0 < drawing.count("<rect") <= 2 * charts.MOST_REQUESTS


def options(url: str, out: Path, **changes: Any) -> BenchOptions:
    traffic = Traffic(prompt_tokens=constant(40), output_tokens=constant(4))
    base: dict[str, Any] = {
        "url": url, "out": out, "seed": 1, "cost": COST, "scenario_name": "test",
        "scenario": Scenario(traffic=(traffic,), load=Closed(kind="closed", users=2), duration=1.5),
    }  # fmt: skip
    return BenchOptions(**(base | changes))


def scenario(**changes: Any) -> Scenario:
    base = {
        "traffic": [{"prompt_tokens": 40, "output_tokens": 4}],
        "load": {"kind": "closed", "users": 2},
    }
    return Scenario.model_validate(base | {"duration": 1.5} | changes)


def bench(out: Path, behaviour: str, **changes: Any) -> tuple[int, dict[str, Any], str]:
    with serving(behaviour) as (url, _):
        status = run_bench(options(url, out, **changes))
    report = json.loads((out / "report.json").read_text())
    jsonschema.validate(report, json.loads(PATH.read_text()))
    return status, report, (out / "report.html").read_text()


class Page(HTMLParser):
    """Notes whatever a page would load from elsewhere, and tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "wbr", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_published_schema_is_the_codes() -> None:
    assert json.loads(PATH.read_text()) == report_schema(), "run python -m loadtest.schema"


def test_a_bench_of_a_foreign_server(tmp_path: Path) -> None:
    cost = load_config(DEFAULT_CONFIG).cost
    with serving("good") as (url, server):
        assert run_bench(options(url, tmp_path, cost=cost)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    # The books of both sides agree to the token.
    everything = report["totals_with_warmup"]
    assert everything["requests"] == len(server.usages) > 4
    for kind in ("prompt_tokens", "completion_tokens"):
        assert everything[kind] == sum(usage[kind] for usage in server.usages)
    assert report["totals"]["requests"] == everything["requests"] - 2 == len(server.begun)
    assert len(set(server.begun)) == len(server.begun)
    load = [r for r in report["requests"] if not r["warmup"]]
    assert {r["prompt_tokens"] for r in load} == {40}
    low, high = report["stages"][0]["window"]
    assert (low, high) == pytest.approx((high - 1.2, low + 1.2))
    assert all(r["measured"] == (low <= r["started_at"] < high) for r in load)
    assert report["totals"]["cached_tokens"] is None  # it never said
    assert report["settings"]["seed"] == 1
    assert "api_key" not in report["settings"]
    assert report["notes"] == [
        "The server has no /tokenize: prompt lengths are estimates, corrected by its usage."
    ]
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == everything["requests"] == len(read_records(tmp_path / "records.jsonl"))
    assert sum(int(row["completion_tokens"]) for row in rows) == everything["completion_tokens"]
    markdown = (tmp_path / "report.md").read_text()
    assert "| 2 users |" in markdown
    # What it says is enough to run the same again: JSON is YAML.
    told = json.loads(markdown.partition("```json\n")[2].partition("```")[0])
    (tmp_path / "again.yaml").write_text(json.dumps(told["scenario"]))
    assert load_scenario(str(tmp_path / "again.yaml"))[1] == options(url, tmp_path).scenario

    html = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert not page.loads
    assert not page.open
    assert not re.search(r"<script|@import|url\(", html)
    assert report["cost"]["estimated"]
    assert "(estimated)" in html
    assert len(report["cost"]["rows"]) >= 10
    # Once in the chart and once in the table.
    for row in report["cost"]["rows"]:
        assert f">{row['reference']}</div>" in html
        assert f"<td>{row['reference'].replace('/', '/<wbr>')}</td>" in html
    every_amount_follows_from_what_is_printed(html)


def every_amount_follows_from_what_is_printed(page: str) -> None:
    """The tables of a report, and its verdict, from the page alone: each sum again, and where its result stands."""
    tables = [
        [
            Step(*(unescape(cell) for cell in row))
            for row in re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", table)
        ]
        for table in re.findall(r'<table class="steps">(.*?)</table>', page)
    ]
    here, *elsewhere, verdict = (
        calculated(step for step in table if step.formula != "the same sums") for table in tables
    )
    shown = {
        cells[0].replace("<wbr>", ""): cells[1:]
        for row in re.findall(
            r"<tr[^>]*>(.*?)</tr>", page.partition('class="costs"')[2].partition("</table>")[0]
        )
        if len(cells := re.findall(r"<td[^>]*>(.*?)</td>", row)) == 7
    }
    for name in ("marginal", "as run", "all costs"):
        cells = shown.pop(f"This rig, {name} (estimated)")
        wanted = [here[f"{name}: {side}, a million tokens"] for side in ("input", "output")]
        assert [cells[0], cells[2], cells[3]] == [USD.text(usd) for usd in (*wanted, here[name])]
    assert len(shown) == len(elsewhere) >= 10
    for (reference, cells), groups in zip(shown.items(), elsewhere, strict=True):
        usd = sum(groups.values())
        assert cells[3] == USD.text(usd), reference
        for text, name in ((cells[4], "as run"), (cells[5], "all costs")):
            saving = float(re.sub("[^0-9.]", "", text)) * (-1 if "LOSS" in text else 1)
            assert saving == pytest.approx(100 * (1 - here[name] / usd), abs=0.11, rel=0.01)
    for name in ("here", "there"):
        amounts = (
            verdict[f"{name}, a million tokens of this traffic"],
            *(verdict[f"{name}, the {end}"] for end in ("least", "most")),
        )
        assert "{} ({} to {})".format(*map(USD.text, amounts)) in page
    minus = "\N{MINUS SIGN}"
    ends = re.search(rf"between ({minus}?[\d,.]+) % and ({minus}?[\d,.]+) %", page)
    assert ends is not None
    for text, end in zip(ends.groups(), ("least", "most"), strict=True):
        percent = float(text.replace(",", "").replace(minus, "-"))
        assert percent == pytest.approx(verdict[f"saving, the {end}"], abs=0.11, rel=0.01)


def test_prompts_are_counted_by_the_server_where_it_counts(tmp_path: Path) -> None:
    status, report, _ = bench(tmp_path, "counts")
    assert (status, report["notes"]) == (0, [])
    load = [r for r in report["requests"] if not r["warmup"]]
    assert {r["prompt_tokens"] for r in load} <= {39, 41}  # two tokens a word, 5 of the template


def test_worker_processes_share_the_load_and_their_records_are_merged(tmp_path: Path) -> None:
    mixed = scenario(
        load={"kind": "closed", "users": 6},
        duration=2.0,
        traffic=[
            {"tenant": "a", "weight": 2, "output_tokens": 4, "prompt_tokens": 40},
            {"tenant": "b", "output_tokens": 2, "prompt_tokens": 30},
        ],
    )
    with serving("paced") as (url, server):
        assert run_bench(options(url, tmp_path, scenario=mixed, workers=2)) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    load = [r for r in report["requests"] if not r["warmup"]]
    assert len(load) == len(server.begun) == len({r["number"] for r in load})
    everything = report["totals_with_warmup"]
    assert everything["completion_tokens"] == sum(u["completion_tokens"] for u in server.usages)
    assert {(r["worker"], r["user"]) for r in load} == {(n % 2, n) for n in range(6)}
    assert len({r["user"] for r in load if r["tenant"] == "a"}) == 4
    assert set(report["stages"][0]["tenants"]) == {"a", "b"}
    assert len(set(server.begun)) == len(server.begun)


def test_a_worker_that_comes_late_is_sent_home(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = ("127.0.0.1", free_port())
    with serving("paced") as (url, server):
        asked = options(url, tmp_path, workers=1, bind=address, scenario=scenario(duration=280.0))
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from loadtest.options import BenchOptions as B; "
            "from loadtest.run import run_bench; sys.exit(run_bench(B.from_json(sys.argv[1])))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, asked.to_json()])
        try:
            wait_for(lambda: server.begun, "the load")
            assert run_worker(Join(*address)) == 2
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert "has all the workers that it was told to wait for" in capfd.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert {r["worker"] for r in report["requests"]} == {0}
    assert report["totals"]["requests"] == len(server.begun)


def test_arrivals_do_not_wait_and_count_from_when_they_were_due(tmp_path: Path) -> None:
    arrivals = scenario(
        load={"kind": "open", "requests_per_second": 20, "arrivals": "constant"}, duration=2.0
    )
    status, report, _ = bench(tmp_path, "slow", scenario=arrivals)  # an answer takes 1.6 s
    assert status == 0
    load = [r for r in report["requests"] if not r["warmup"]]
    assert len(load) == 40
    starts = sorted(r["started_at"] for r in load)
    assert max(later - earlier for earlier, later in itertools.pairwise(starts)) < 0.06
    assert all(r["sent_at"] >= r["started_at"] for r in load)
    assert report["totals"]["errors"] == 0


def test_a_sweep_raises_the_load_by_itself(tmp_path: Path) -> None:
    sweep = scenario(load={"kind": "sweep", "most": 4, "max_stages": 3}, duration=1.0)
    status, report, html = bench(tmp_path, "paced", scenario=sweep)
    assert status == 0
    assert [stage["users"] for stage in report["stages"]] == [1, 2, 4]
    rates = [stage["summary"]["completion_tokens_per_second"] for stage in report["stages"]]
    assert rates[2] > 2 * rates[0]
    assert report["knee"] is None, "this server takes any number"
    assert "Throughput" in html
    assert_readable(tmp_path / "report.html")


def test_a_sweep_that_goes_back_takes_the_surplus_users_away_before(tmp_path: Path) -> None:
    sweep = scenario(load={"kind": "sweep", "start": 2, "max_stages": 5}, duration=1.0)
    status, report, _ = bench(tmp_path, "crowded", scenario=sweep)
    assert status == 0
    loads = [stage["users"] for stage in report["stages"]]
    assert loads == [2, 4, 8, 16, 3]
    users: dict[int, set[int]] = {}
    for request in report["requests"]:
        if not request["warmup"]:
            users.setdefault(request["stage"], set()).add(request["user"])
    assert [len(of_stage) for of_stage in users.values()] == loads


def assert_readable(page_file: Path) -> None:
    """In a real browser: nothing beside the page, nothing wider than the screen, no error, also in print."""
    complaints: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser(), args=["--no-sandbox", "--disable-gpu"]
        )
        for width, scheme in ((390, "light"), (1200, "dark")):
            page = chromium.new_page(
                viewport={"width": width, "height": 800},
                color_scheme="dark" if scheme == "dark" else "light",
            )
            page.on("request", lambda request: complaints.append(request.url))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(page_file.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ink, paper = page.evaluate(
                "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])"
            )
            light_on_dark = _brightness(ink) > _brightness(paper)
            assert light_on_dark is (scheme == "dark")
            assert page.locator("svg").count() >= 12
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 700, "height": 990})  # A4 within a browser's margins
        cut_off = "Array.from(document.querySelectorAll('.scroll, pre')).filter(each => each.scrollWidth > each.clientWidth)"
        assert page.evaluate(f"{cut_off}.map(each => each.innerText.slice(0, 40))") == []
        pdf = page.pdf()
        chromium.close()
    assert {urlsplit(url).scheme for url in complaints} == {"file"}
    assert pdf.startswith(b"%PDF")


def _brightness(colour: str) -> int:
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def test_the_web_ui_has_charts_of_tokens(tmp_path: Path) -> None:
    with serving("paced") as (url, _):
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from loadtest.options import BenchOptions as B; "
            "from loadtest.run import run_bench; sys.exit(run_bench(B.from_json(sys.argv[1])))"
        )
        asked = options(url, tmp_path, web=True).to_json()
        process = subprocess.Popen([sys.executable, "-c", code, asked])
        try:
            wait_for(lambda: "<svg" in _text("http://127.0.0.1:8089/llm"), "charts")
            assert "LLM charts</a></body>" in _text("http://127.0.0.1:8089/")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["stages"][0]["summary"]["totals"]["requests"] > 2


def _text(url: str) -> str:
    try:
        return requests.get(url, timeout=5).text
    except requests.ConnectionError:
        return ""


def test_a_staircase_and_a_trace(tmp_path: Path) -> None:
    steps = scenario(load={"kind": "steps", "steps": [{"users": 1}, {"users": 3}]}, duration=2.0)
    status, report, _ = bench(tmp_path / "steps", "paced", scenario=steps)
    assert status == 0
    assert [stage["label"] for stage in report["stages"]] == ["1 user", "3 users"]
    second = [r for r in report["requests"] if r["stage"] == 1 and r["measured"]]
    assert len({r["user"] for r in second}) == 3

    trace = tmp_path / "trace.csv"
    trace.write_text("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
                     "3,m,40,2,42,x\n5,m,60,4,64,x\n6,m,50,3,53,x\n")  # fmt: skip
    replay = scenario(
        load={"kind": "replay", "trace": str(trace), "speed": 2.0}, warm_up=0.0, cool_down=0.0
    )
    status, report, _ = bench(tmp_path / "trace", "paced", scenario=replay)
    load = sorted((r for r in report["requests"] if not r["warmup"]), key=lambda r: r["started_at"])
    begin = load[0]["started_at"]
    assert [r["started_at"] - begin for r in load] == pytest.approx([0, 1.0, 1.5])
    assert [r["completion_tokens"] for r in load] == [2, 4, 3]
    assert [r["wanted_prompt_tokens"] for r in load] == [40, 60, 50]


def test_a_gate_that_does_not_hold_is_an_exit_status_with_its_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving("paced") as (url, _):
        assert run_bench(options(url, tmp_path / "a", slo=("ttft p50 < 5s", "errors < 1%"))) == 0
        capfd.readouterr()
        assert run_bench(options(url, tmp_path / "b", slo=("ttft p50 < 0.001ms",))) == 3
        assert "FAIL: ttft p50 < 0.001ms (2 users): it is" in capfd.readouterr().out
    with serving("slow") as (url, _):
        slower = options(
            url,
            tmp_path / "d",
            baseline=tmp_path / "a" / "report.json",
            scenario=scenario(duration=5.0),
        )
        assert run_bench(slower) == 3
    assert "FAIL: TPOT p50 (2 users)" in capfd.readouterr().out


def test_failures_are_counted_by_class(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    status, report, _ = bench(tmp_path, "busy")
    # Word for word, though rich would read brackets as markup.
    assert "the first: all slots [/of 8] are taken" in capfd.readouterr().out
    assert status == 1
    assert report["totals"]["errors"] == report["totals"]["requests"] > 0
    summary = report["stages"][0]["summary"]
    assert summary["error_classes"] == {"http_503": summary["totals"]["errors"]}
    assert summary["first_error"] == "all slots [/of 8] are taken"
    assert report["cost"] is None


def test_energy_is_the_servers_even_if_it_hangs_up_on_idle_clients(tmp_path: Path) -> None:
    _, report, _ = bench(tmp_path, "metered", cost=CostConfig())
    assert report["cost"]["peer_basis"].startswith("suggested: tiny does not tell its size")
    peers, _ = suggest_peers("tiny", installed())
    assert report["cost"]["verdict"]["reference"] == peers[0]
    assert not [note for note in report["notes"] if "others" in note]
    traffic = report["cost"]["traffic"]
    assert traffic["energy_source"] == "nvml"
    assert traffic["energy_joules"] == JOULES_A_REQUEST * report["totals"]["requests"]


def test_a_server_that_knows_no_ignore_eos_is_benched_without(tmp_path: Path) -> None:
    status, report, _ = bench(tmp_path, "strict")
    assert status == 0
    assert "ignore_eos" in report["notes"][0]
    assert report["totals"]["errors"] == 0


def test_a_server_without_usage_gets_no_invented_tokens(tmp_path: Path) -> None:
    status, report, _ = bench(tmp_path, "no usage")
    assert status == 0
    assert report["totals"]["completion_tokens"] is None
    assert report["cost"] is None


@pytest.mark.parametrize("how", ["one Ctrl-C", "two", "killed"])
def test_a_bench_that_is_stopped_still_reports(tmp_path: Path, how: str) -> None:
    with serving("slow") as (url, server):
        code = (
            # A shell starts what it runs in the background with SIGINT ignored.
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from loadtest.options import BenchOptions as B; "
            "from loadtest.run import run_bench; sys.exit(run_bench(B.from_json(sys.argv[1])))"
        )
        asked = options(url, tmp_path, scenario=scenario(duration=3600)).to_json()
        process = subprocess.Popen([sys.executable, "-c", code, asked])
        wait_for(lambda: server.begun, "the load")
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGINT)
        if how == "two":
            time.sleep(0.5)  # subprocess.wait() takes two within a quarter of a second for one
            process.send_signal(signal.SIGINT)
        status = process.wait(20)
        page = tmp_path / "report.html"  # written last
        wait_for(lambda: page.exists() and "</html>" in page.read_text(), "the report")
        report = json.loads((tmp_path / "report.json").read_text())
        begun = len(server.begun)
        time.sleep(0.5)
        assert len(server.begun) == begun, "the load went on"
    assert report["totals"]["requests"] == begun
    errors = [r["error"] for r in report["requests"] if not r["warmup"]]
    if how == "one Ctrl-C":
        assert status == 0
        assert errors == [None] * begun
    else:
        assert errors == ["abandoned"] * begun


def test_what_cannot_be_used_is_a_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    nobody = "http://127.0.0.1:9/v1"
    for changes, said in (
        ({}, "cannot reach 127.0.0.1:9"),
        ({"slo": ("fast",)}, "--slo 'fast' is not of the form"),
        ({"baseline": tmp_path / "none.json"}, "none.json: No such file"),
        ({"web": True, "scenario": scenario(load={"kind": "sweep"})}, "--web: users are steered"),
    ):
        assert run_bench(options(nobody, tmp_path / "r", **changes)) == 2
        message = capfd.readouterr().err
        assert said in message
        assert "Traceback" not in message
    assert not (tmp_path / "r").exists()
