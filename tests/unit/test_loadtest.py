"""What the load test measures, against hand-made streams and NumPy."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loadtest import charts
from loadtest.client import Client, sse_events
from loadtest.measures import distribution, summarize, throughput_over_time
from loadtest.options import BenchOptions, parse_duration
from loadtest.pricing import EnergyReading, traffic_of
from loadtest.prompts import Calibration, excerpt
from loadtest.records import RequestRecord
from loadtest.run import run_bench
from serving.config import CostConfig, load_config
from tests.processes import wait_for

COST = CostConfig(compare_to=("openai/gpt-4o-mini", "openai/gpt-4o"))
DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"
JOULES_A_REQUEST = 2.0


def record(**fields: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "number": 0, "user": 0, "warmup": False, "started_at": 1.0, "ended_at": 3.0,
        "first_token_at": 1.5, "chunk_gaps_seconds": [0.5, 0.5, 0.25], "prompt_tokens": 10,
        "cached_tokens": 2, "completion_tokens": 6, "finish_reason": "stop",
    }  # fmt: skip
    return RequestRecord(**(base | fields))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles_are_numpys(values: list[float]) -> None:
    result = distribution(values)
    assert result is not None
    for percent, value in ((50, result.p50), (90, result.p90), (99, result.p99)):
        assert value == pytest.approx(np.percentile(values, percent), abs=1e-6)
    assert result.mean == pytest.approx(np.mean(values), abs=1e-6)


def test_latencies_by_hand() -> None:
    one = record()
    assert one.ttft_seconds == 0.5
    assert one.end_to_end_seconds == 2.0
    assert one.tpot_seconds == pytest.approx(1.25 / 5)
    assert record(first_token_at=None).ttft_seconds is None
    assert record(completion_tokens=1).tpot_seconds is None


def test_a_summary_leaves_warm_up_and_failures_apart() -> None:
    records = [
        record(warmup=True, started_at=0.0, ended_at=1.0),
        record(),
        record(user=1, started_at=2.0, ended_at=5.0, first_token_at=2.5, completion_tokens=14),
        record(error="http_503", error_message="full", prompt_tokens=None, completion_tokens=None),
    ]
    summary = summarize(records)
    assert summary.window_seconds == 4.0
    assert (summary.totals.requests, summary.totals.errors) == (3, 1)
    assert summary.totals.completion_tokens == 20
    assert summary.totals_with_warmup.completion_tokens == 26
    assert summary.completion_tokens_per_second == 5.0
    assert (summary.users, summary.completion_tokens_per_second_per_user) == (2, 2.5)
    assert summary.prompt_tokens_per_second_per_user == 2.5
    assert summary.requests_per_second == 0.5
    assert summary.error_classes == {"http_503": 1}
    assert summary.first_error == "full"
    assert summary.ttft_seconds is not None
    assert summary.ttft_seconds.count == 2


def test_unknown_tokens_are_not_invented() -> None:
    summary = summarize([record(), record(prompt_tokens=None, completion_tokens=None)])
    assert summary.totals.completion_tokens is None
    assert summary.completion_tokens_per_second is None
    assert traffic_of([record(completion_tokens=None)], None, None, COST) is None


def test_throughput_over_time_keeps_every_token() -> None:
    points = throughput_over_time(
        [record(), record(started_at=2.0, ended_at=5.0, first_token_at=4.0)], 8
    )
    width = points[1][0] - points[0][0]
    assert sum(rate * width for _, rate in points) == pytest.approx(12)


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
    # Without them: two requests that overlap keep the server busy for the time either is open.
    foreign = traffic_of(
        [record(), record(started_at=2.0, ended_at=4.0, first_token_at=2.5)], None, None, COST
    )
    assert foreign is not None
    assert foreign.busy_seconds == pytest.approx(3.0)
    assert foreign.energy_joules == pytest.approx(3.0 * COST.power.load_watts)
    assert foreign.estimated


@given(st.lists(st.integers(1, 60)))
def test_events_survive_every_split(sizes: list[int]) -> None:
    stream = b'data: {"a": "\xc3\xa9"}\n\n: a comment\n\ndata:{"b":2}\r\n\r\ndata: [DONE]\n\n'

    def reads() -> Iterator[bytes]:
        at = 0
        for size in [*sizes, len(stream)]:
            yield stream[at : at + size]
            at += size

    assert list(sse_events(reads())) == [b'{"a": "\xc3\xa9"}', b'{"b":2}', b"[DONE]"]


def test_prompts_differ_repeat_and_have_the_wanted_length() -> None:
    assert excerpt(1, 20, seed=0) == excerpt(1, 20, seed=0)
    assert excerpt(1, 20, seed=0) != excerpt(1, 20, seed=1)
    assert len({excerpt(number, 5000, seed=0) for number in range(50)}) == 50
    # 8 tokens of template and 1.5 tokens a word.
    calibration = Calibration((10, 23), (60, 98))
    assert calibration.words_for(98) == 60
    assert calibration.words_for(1) == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("2m", 120), ("1.5h", 5400), ("45", 45), ("7d", 604800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0s", "-3s", "3 weeks", "1e3"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@given(
    st.lists(st.floats(0, 1e7), min_size=1, max_size=60),
    st.lists(st.floats(0, 1e5), min_size=1, max_size=60),
)
@example([0.0], [5e-324])
def test_charts_stay_within_their_frames(values: list[float], rates: list[float]) -> None:
    middle = sorted(values)[len(values) // 2]
    drawings = (
        charts.cumulative(values, {50: middle}, "ms"),
        charts.area([(number + 0.5, rate) for number, rate in enumerate(rates)], "s", "tokens/s"),
        charts.timeline([(0, 0.0, v / 2, v, False) for v in values], "seconds"),
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
        assert all(0 <= float(x) <= width for x in re.findall(r' c?x="([^"]+)"', drawing))


def test_a_timeline_of_very_many_requests_stays_small() -> None:
    drawing = charts.timeline([(0, n, n + 0.4, n + 1.0, False) for n in range(100_000)], "s")
    assert 0 < drawing.count("<rect") <= 2 * charts.MOST_REQUESTS


class OpenAIServer(BaseHTTPRequestHandler):
    """A small server in OpenAI's shape; ``behaviour`` chooses how it misbehaves."""

    behaviour = "good"
    usages: list[dict[str, int]]  # one for each answer it has finished
    begun: list[str]  # the prompts of the load, without those of the warm-up
    protocol_version = "HTTP/1.1"
    timeout = 0.5  # then it hangs up on an idle connection

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": "tiny"}]}).encode())
        elif self.path == "/metrics" and self.behaviour == "metered":
            joules = JOULES_A_REQUEST * len(self.usages)
            metric = f'rigserve_energy_joules_total{{model="tiny",source="nvml"}} {joules}\n'
            self.answer(200, metric.encode())
        else:
            self.answer(404, b"no such thing")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"]
        words = len(prompt.split())
        warm_up = words in (11, 61)
        behaviour = "good" if warm_up and self.behaviour != "strict" else self.behaviour
        if not warm_up:
            self.begun.append(prompt)
        if behaviour == "strict" and "ignore_eos" in body:
            self.answer(400, b'{"error": {"message": "Extra inputs are not permitted"}}')
            return
        if behaviour == "busy":
            self.answer(503, b'{"error": {"message": "all slots are taken"}}')
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        self.send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for letter in "abcd"[: body["max_tokens"]]:
            if behaviour == "slow":
                time.sleep(0.4)
            delta: dict[str, Any] = {"content": letter}
            if behaviour == "thinks and calls":
                call = {"index": 0, "function": {"arguments": letter}}
                delta = {"reasoning_content": letter} if letter < "c" else {"tool_calls": [call]}
            self.send({"choices": [{"delta": delta}], "error": None})
        if behaviour in MISSHAPEN:
            self.wfile.write(b"data: " + MISSHAPEN[behaviour][0] + b"\n\n")
            return
        self.send({"choices": [{"delta": None, "finish_reason": "length"}]})
        if behaviour == "no end":
            return
        usage = {"prompt_tokens": words + 5, "completion_tokens": min(body["max_tokens"], 4)}
        self.usages.append(usage)
        if self.behaviour != "no usage":
            self.send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        pass


MISSHAPEN = {  # what is sent instead of the end: (data, class, part of the message)
    "dies": (b'{"error": {"message": "engine died"}}', "stream_error", "engine died"),
    "says no more": (b'{"error": "out of memory"}', "stream_error", "out of memory"),
    "no JSON": (b"{oops", "malformed_stream", "shape"),
    "a list": (b"[1]", "malformed_stream", "shape"),
    "no [DONE]": (b'{"choices": []}', "incomplete_stream", "broke off"),
}


class QuietServer(ThreadingHTTPServer):
    """Clients that hang up are part of the tests."""

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(behaviour: str) -> Iterator[tuple[str, type[OpenAIServer]]]:
    """A running server: its base URL, and where it counts."""
    handler = type("Handler", (OpenAIServer,), {"behaviour": behaviour, "usages": [], "begun": []})
    with QuietServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
        server.shutdown()


def options(url: str, out: Path, **changes: Any) -> BenchOptions:
    base: dict[str, Any] = {
        "url": url, "model": None, "api_key": None, "users": 2, "duration_seconds": 1.5,
        "prompt_tokens": 40, "output_tokens": 4, "out": out, "web": False, "seed": 1, "cost": COST,
    }  # fmt: skip
    return BenchOptions(**(base | changes))


def bench(out: Path, behaviour: str, **changes: Any) -> tuple[int, dict[str, Any], str]:
    with serving(behaviour) as (url, _):
        status = run_bench(options(url, out, **changes))
    return status, json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


def one_request(url: str) -> RequestRecord:
    result = RequestRecord(number=0, user=0, warmup=False, started_at=0.0)
    words = {"messages": [{"role": "user", "content": "a prompt"}], "max_tokens": 4}
    client = Client(url, None)
    client.stream_chat(words, result, time.monotonic)
    client.close()
    return result


def test_reasoning_and_calls_are_timed_as_text_is() -> None:
    with serving("thinks and calls") as (url, _):
        result = one_request(url)
    assert result.first_token_at is not None
    assert len(result.chunk_gaps_seconds) == 3


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
    measured = [r for r in report["requests"] if not r["warmup"]]
    assert {r["prompt_tokens"] for r in measured} == {40}
    assert report["totals"]["cached_tokens"] is None  # it never said
    assert report["settings"]["seed"] == 1
    assert "api_key" not in report["settings"]
    assert report["notes"] == []
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == everything["requests"]
    assert sum(int(row["completion_tokens"]) for row in rows) == everything["completion_tokens"]

    html = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(html)
    assert not page.loads
    assert not page.open
    assert not re.search(r"<script|@import|url\(", html)
    assert report["cost"]["estimated"]
    assert "(estimated)" in html
    assert len(report["cost"]["rows"]) >= 10
    # Once in the chart and once in the table; the settings repeat them without the mark-up.
    for row in report["cost"]["rows"]:
        assert f">{row['reference']}</div>" in html
        assert f"<td>{row['reference'].replace('/', '/<wbr>')}</td>" in html


@pytest.mark.parametrize("behaviour", MISSHAPEN)
def test_misshapen_streams_are_errors_with_their_reason(behaviour: str) -> None:
    with serving(behaviour) as (url, _):
        result = one_request(url)
    _, error, message = MISSHAPEN[behaviour]
    assert result.error == error
    assert message in (result.error_message or "")
    assert result.first_token_at is not None


def test_a_stream_without_its_end_is_incomplete() -> None:
    with serving("no end") as (url, _):
        result = one_request(url)
    assert (result.error, result.finish_reason) == ("incomplete_stream", "length")


def test_failures_are_counted_by_class(tmp_path: Path) -> None:
    status, report, _ = bench(tmp_path, "busy")
    assert status == 1
    assert report["totals"]["errors"] == report["totals"]["requests"] > 0
    assert report["error_classes"] == {"http_503": report["totals"]["errors"]}
    assert report["first_error"] == "all slots are taken"
    assert report["cost"] is None


def test_energy_is_the_servers_even_if_it_hangs_up_on_idle_clients(tmp_path: Path) -> None:
    _, report, _ = bench(tmp_path, "metered")
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
        asked = options(url, tmp_path, duration_seconds=3600).to_json()
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
    if how == "one Ctrl-C":
        assert status == 0
        assert report["totals"]["errors"] == 0
    else:
        assert report["error_classes"] == {"abandoned": begun}


def test_a_server_that_is_not_there_is_a_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(options("http://127.0.0.1:9/v1", tmp_path / "r")) == 2
    message = capfd.readouterr().err
    assert "cannot reach 127.0.0.1:9" in message
    assert "Traceback" not in message
    assert not (tmp_path / "r").exists()


def test_options_that_make_no_sense_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(options("http://127.0.0.1:9/v1", tmp_path, users=0)) == 2
    assert "--users must be at least 1, not 0" in capfd.readouterr().err
