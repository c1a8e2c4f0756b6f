"""One bench from its first probe to its report. Runs in a process that gevent has taken over."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import gevent
from locust import User, constant, task
from locust.env import Environment
from rich.console import Console

from loadtest.client import Client, ServerError, monotonic_since
from loadtest.measures import summarize
from loadtest.options import BenchOptions
from loadtest.pricing import energy_by_source, traffic_of
from loadtest.prompts import Calibration, excerpt
from loadtest.records import RequestRecord
from loadtest.report import Report, host_facts, write_report
from loadtest.terminal import show_progress, show_report
from serving.cost.comparison import compare
from serving.cost.prices import PriceBook, UnknownModel

# Requests in flight at the end of the time are finished and counted, if they take no longer than this.
_GRACE_SECONDS = 300
_WEB_HOST = "127.0.0.1"
_WEB_PORT = 8089
_SHORT_WORDS, _LONG_WORDS = 10, 60


class Bench:
    """The state that users share."""

    def __init__(self, options: BenchOptions) -> None:
        self.options = options
        self.api_key = options.api_key or os.environ.get("OPENAI_API_KEY")
        self.records: list[RequestRecord] = []
        self.clock = monotonic_since(time.monotonic())
        self.notes: list[str] = []
        self.model = ""
        self.words = 1
        self.ignore_eos = True
        self.stopping = False
        self._numbers = itertools.count()

    def new_client(self) -> Client:
        """A client for one user."""
        return Client(self.options.url, self.api_key)

    def probe(self) -> None:
        """Choose the model, warm the server up, learn its tokenizer; raises :class:`ServerError`."""
        client = self.new_client()
        served = client.models()
        self.model = self.options.model or (served[0] if served else "")
        if not self.model:
            raise ServerError("the server lists no models; name one with --model")
        short = self._warm_up(client, _SHORT_WORDS)
        if short.error == "http_400" and "ignore_eos" in (short.error_message or ""):
            self.ignore_eos = False
            self.notes.append(
                "The server does not take ignore_eos: answers may be shorter than --output-tokens."
            )
            short = self._warm_up(client, _SHORT_WORDS)
        long = self._warm_up(client, _LONG_WORDS)
        for record in (short, long):
            if record.error:
                raise ServerError(f"a first request failed: {record.error_message}")
        if short.prompt_tokens is None or long.prompt_tokens is None:
            self.notes.append(
                "The server sends no usage: tokens are unknown, and nothing is priced."
            )
            self.words = max(int(self.options.prompt_tokens * 0.75), 1)
            return
        calibration = Calibration(
            (_SHORT_WORDS, short.prompt_tokens), (_LONG_WORDS, long.prompt_tokens)
        )
        self.words = calibration.words_for(self.options.prompt_tokens)

    def _warm_up(self, client: Client, words: int) -> RequestRecord:
        return self.request(client, user=-1, words=words, warmup=True)

    def request(
        self, client: Client, *, user: int, words: int, warmup: bool = False
    ) -> RequestRecord:
        """Send one request and keep its record."""
        number = next(self._numbers)
        record = RequestRecord(number=number, user=user, warmup=warmup, started_at=self.clock())
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": excerpt(number, words, self.options.seed)}],
            "max_tokens": self.options.output_tokens,
            "temperature": 0,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        client.stream_chat(body, record, self.clock)
        self.records.append(record)
        return record


def _user_class(bench: Bench) -> type[User]:
    numbers = itertools.count()

    class ChatUser(User):
        """Sends one chat completion after the other, without pauses."""

        wait_time = constant(0)

        def on_start(self) -> None:
            self.number = next(numbers)
            self.bench_client = bench.new_client()

        def on_stop(self) -> None:
            self.bench_client.close()

        @task
        def chat(self) -> None:
            if bench.stopping:
                gevent.sleep(0.05)
                return
            record = bench.request(self.bench_client, user=self.number, words=bench.words)
            self.environment.events.request.fire(
                request_type="chat",
                name="end to end",
                response_time=record.end_to_end_seconds * 1e3,
                response_length=record.completion_tokens or 0,
                exception=RuntimeError(record.error_message) if record.error else None,
                context={},
            )
            if record.ttft_seconds is not None:
                self.environment.events.request.fire(
                    request_type="chat",
                    name="time to first token",
                    response_time=record.ttft_seconds * 1e3,
                    response_length=0,
                    exception=None,
                    context={},
                )
            if record.error:
                gevent.sleep(1)  # a server that refuses is not hammered

    return ChatUser


def run(options: BenchOptions) -> int:
    """Probe, load, report; returns the exit status."""
    console = Console()
    out = options.out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    bench = Bench(options)
    try:
        prices = PriceBook(options.cost.compare_to)
        out.mkdir(parents=True, exist_ok=True)
        bench.probe()
    except (ServerError, UnknownModel) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {out}: {error.strerror}", file=sys.stderr)
        return 2
    meter = bench.new_client()
    energy_before = energy_by_source(meter)
    started = datetime.now().astimezone()
    _load(bench, console)
    # The last requests are metered moments after their streams end.
    gevent.sleep(0.3)
    traffic = traffic_of(bench.records, energy_before, energy_by_source(meter), options.cost)
    report = Report(
        options=options,
        model=bench.model,
        started=started,
        host=host_facts(),
        notes=tuple(bench.notes),
        records=tuple(sorted(bench.records, key=lambda record: record.number)),
        summary=summarize(bench.records),
        cost=compare(traffic, options.cost, prices) if traffic else None,
    )
    write_report(report, out)
    show_report(console, report, out)
    succeeded = report.summary.totals.requests > report.summary.totals.errors
    return 0 if succeeded else 1


def _load(bench: Bench, console: Console) -> None:
    options = bench.options
    environment = Environment(user_classes=[_user_class(bench)], stop_timeout=_GRACE_SECONDS)
    runner = environment.create_local_runner()
    if options.web:
        web = environment.create_web_ui(_WEB_HOST, _WEB_PORT)
        console.print(f"Locust's web UI: http://{_WEB_HOST}:{_WEB_PORT}; Ctrl-C ends and reports")
    runner.start(options.users, spawn_rate=max(options.users, 1))
    begun = time.monotonic()
    deadline = float("inf") if options.web else begun + options.duration_seconds
    try:
        show_progress(console, bench.records, options.users, _until(deadline))
    except KeyboardInterrupt:
        console.print("ending early; requests in flight are finished first")
    bench.stopping = True
    try:
        runner.quit()
    except KeyboardInterrupt:
        console.print("not waiting for requests in flight")
    if options.web:
        web.stop()


def _until(deadline: float) -> Callable[[], float | None]:
    """Seconds that remain, then None."""

    def remaining() -> float | None:
        left = deadline - time.monotonic()
        return left if left > 0 else None

    return remaining
