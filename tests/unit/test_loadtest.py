"""What the load test measures, against hand-made streams and NumPy."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client import sse_events
from loadtest.measures import distribution, summarize, throughput_over_time
from loadtest.options import BenchOptions, parse_duration
from loadtest.pricing import traffic_of
from loadtest.prompts import Calibration, excerpt
from loadtest.records import RequestRecord
from loadtest.run import run_bench
from serving.config import CostConfig

COST = CostConfig(compare_to=("openai/gpt-4o-mini", "openai/gpt-4o"))
CHUNKS = [
    {"delta": {"role": "assistant", "content": ""}},
    *({"delta": {"content": w}} for w in "abcd"),
]


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
        record(started_at=2.0, ended_at=5.0, first_token_at=2.5, completion_tokens=14),
        record(error="http_503", error_message="full", prompt_tokens=None, completion_tokens=None),
    ]
    summary = summarize(records)
    assert summary.window_seconds == 4.0
    assert (summary.totals.requests, summary.totals.errors) == (3, 1)
    assert summary.totals.completion_tokens == 20
    assert summary.totals_with_warmup.completion_tokens == 26
    assert summary.completion_tokens_per_second == 5.0
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


def test_traffic_uses_the_servers_meters_where_it_has_some() -> None:
    timings = {"prefill_busy_seconds": 0.25, "decode_busy_seconds": 1.0}
    measured = traffic_of([record(timings=timings)], {"nvml": 5.0}, {"nvml": 25.0}, COST)
    assert measured is not None
    assert (measured.prefill_busy_seconds, measured.decode_busy_seconds) == (0.25, 1.0)
    assert (measured.energy_joules, measured.energy_source) == (20.0, "nvml")
    assert not measured.estimated
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


class OpenAIServer(BaseHTTPRequestHandler):
    """A small server in OpenAI's shape; ``behaviour`` chooses how it misbehaves."""

    behaviour = "good"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = self.path == "/v1/models"
        self.answer(200 if found else 404, json.dumps({"data": [{"id": "tiny"}]}).encode())

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = len(body["messages"][0]["content"].split())
        if self.behaviour == "strict" and "ignore_eos" in body:
            self.answer(400, b'{"error": {"message": "Unknown parameter: ignore_eos"}}')
            return
        if self.behaviour == "busy" and words != 11 and words != 61:
            self.answer(503, b'{"error": {"message": "all slots are taken"}}')
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for chunk in CHUNKS:
            self.send({"choices": [chunk]})
        if self.behaviour == "breaks" and words != 11 and words != 61:
            return
        if self.behaviour == "fails" and words != 11 and words != 61:
            self.send({"error": {"message": "engine died"}})
            return
        self.send({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": words + 5, "completion_tokens": 4}
        if self.behaviour != "no usage":
            self.send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        pass


def bench(tmp_path: Path, behaviour: str) -> tuple[int, dict[str, Any], str]:
    handler = type("Handler", (OpenAIServer,), {"behaviour": behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status = run_bench(
            BenchOptions(
                url=f"http://127.0.0.1:{server.server_port}/v1", model=None, api_key=None, users=2,
                duration_seconds=1.5, prompt_tokens=40, output_tokens=4, out=tmp_path, web=False,
                seed=1, cost=COST,
            )
        )  # fmt: skip
        server.shutdown()
    report = json.loads((tmp_path / "report.json").read_text())
    return status, report, (tmp_path / "report.html").read_text()


class Page(HTMLParser):
    """Notes whatever a page would load from elsewhere, and tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_bench_of_a_foreign_server(tmp_path: Path) -> None:
    status, report, html = bench(tmp_path, "good")
    assert status == 0
    assert report["totals"]["requests"] > 2
    assert report["totals"]["completion_tokens"] == 4 * report["totals"]["requests"]
    assert report["totals_with_warmup"]["requests"] == report["totals"]["requests"] + 2
    measured = [r for r in report["requests"] if not r["warmup"]]
    assert {r["prompt_tokens"] for r in measured} == {40}
    assert report["cost"]["estimated"]
    assert report["settings"]["seed"] == 1
    assert "api_key" not in report["settings"]
    page = Page()
    page.feed(html)
    assert not page.loads
    assert not page.open
    assert "<script" not in html
    assert "estimated" in html


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [("busy", "http_503"), ("fails", "stream_error"), ("breaks", "incomplete_stream")],
)
def test_failures_are_counted_by_class(tmp_path: Path, behaviour: str, error: str) -> None:
    status, report, _ = bench(tmp_path, behaviour)
    assert status == 1
    assert report["totals"]["errors"] == report["totals"]["requests"] > 0
    assert list(report["error_classes"]) == [error]
    assert report["cost"] is None


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


def test_a_server_that_is_not_there_is_a_clear_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = BenchOptions(
        url="http://127.0.0.1:9/v1", model=None, api_key=None, users=1, duration_seconds=1,
        prompt_tokens=9, output_tokens=9, out=tmp_path / "r", web=False, seed=0, cost=COST,
    )  # fmt: skip
    assert run_bench(options) == 2
    assert "cannot reach 127.0.0.1:9" in capfd.readouterr().err
