"""One bench from its first probe to its report. Runs in a process that gevent has taken over."""

from __future__ import annotations

import ipaddress
import itertools
import os
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gevent
from gevent.event import Event
from gevent.select import select
from locust import User, constant, task
from locust.env import Environment
from rich.console import Console

from loadtest.client import Client, ServerError, monotonic_since
from loadtest.measures import summarize
from loadtest.options import BenchOptions
from loadtest.pricing import EnergyReading, energy_by_source, traffic_of
from loadtest.prompts import Calibration, excerpt
from loadtest.records import RequestRecord
from loadtest.report import Report, host_facts, write_report
from loadtest.terminal import show_progress, show_report
from serving.cost.comparison import compare
from serving.cost.prices import PriceBook, UnknownModel

# Requests in flight at the end of the time are finished and counted, if they take no longer than this.
_GRACE_SECONDS = 300
_METERING_SECONDS = 0.3
_STDIN = 0
_INTERRUPTED = 130
_WEB_HOST = "127.0.0.1"
_WEB_PORT = 8089
_SHORT_WORDS, _LONG_WORDS = 10, 60
_WARM_UP_TOKENS = 8


class Bench:
    """The state that users share."""

    def __init__(self, options: BenchOptions) -> None:
        self.options = options
        self.api_key = options.api_key or os.environ.get("OPENAI_API_KEY")
        self.records: list[RequestRecord] = []
        self.started = datetime.now().astimezone()
        self.clock = monotonic_since(time.monotonic())
        self.notes: list[str] = []
        self.model = ""
        self.words = 1
        self.ignore_eos = True
        self.stopping = False
        self._numbers = itertools.count()
        self._in_flight: dict[int, RequestRecord] = {}

    def new_client(self) -> Client:
        """A client for one user."""
        return Client(self.options.url, self.api_key)

    def probe(self) -> None:
        """Choose the model, warm the server up, learn its tokenizer; raises :class:`ServerError`."""
        client = self.new_client()
        self.model = self.options.model or next(iter(client.models()), "")
        if not self.model:
            raise ServerError("the server lists no models; name one with --model")
        short = self._warm_up(client, _SHORT_WORDS)
        if short.error in ("http_400", "http_422"):
            # Perhaps because of ignore_eos, which is no part of OpenAI's API. The next answer will tell.
            self.ignore_eos = False
            self.notes.append(
                "The server does not take ignore_eos: answers may be shorter than --output-tokens."
            )
            short = self._warm_up(client, _SHORT_WORDS)
        long = self._warm_up(client, _LONG_WORDS)
        client.close()
        for record in (short, long):
            if record.error:
                raise ServerError(
                    f"a first request failed ({record.error}): {record.error_message}"
                )
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
        tokens = min(self.options.output_tokens, _WARM_UP_TOKENS)
        return self.request(client, user=-1, words=words, output_tokens=tokens, warmup=True)

    def request(
        self, client: Client, *, user: int, words: int, output_tokens: int, warmup: bool = False
    ) -> RequestRecord:
        """Send one request, read its answer to the end, and keep its record."""
        number = next(self._numbers)
        record = RequestRecord(number=number, user=user, warmup=warmup, started_at=self.clock())
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": excerpt(number, words, self.options.seed)}],
            "max_tokens": output_tokens,
            "temperature": 0,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        self._in_flight[number] = record
        client.stream_chat(body, record, self.clock)
        del self._in_flight[number]
        self.records.append(record)
        return record

    def abandon(self) -> None:
        """Count the requests whose users were stopped before the answer's end, as errors."""
        for record in self._in_flight.values():
            record.ended_at = self.clock()
            record.error, record.error_message = "abandoned", "not finished when the bench ended"
            self.records.append(record)
        self._in_flight.clear()


class Leash:
    """What comes down the standard input from :func:`loadtest.run.run_bench` after the options.

    ``end`` is set by a line: no more requests. ``abandon`` by a second one, or with ``end`` when the other
    process is gone: no more waiting either.
    """

    def __init__(self) -> None:
        self.end, self.abandon = Event(), Event()
        gevent.spawn(self._watch)

    def _watch(self) -> None:
        while not self.abandon.is_set():
            select([_STDIN], [], [])
            said = os.read(_STDIN, 1024)
            if not said or self.end.is_set() or said.count(b"\n") > 1:
                self.abandon.set()
            self.end.set()


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
            record = bench.request(
                self.bench_client,
                user=self.number,
                words=bench.words,
                output_tokens=bench.options.output_tokens,
            )
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
    leash = Leash()
    out = options.out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        prices = PriceBook(options.cost.compare_to)
        if options.web:
            _require_web_port()
        bench = Bench(options)
        probing = gevent.spawn(_problem, bench)
        gevent.wait([probing, leash.end], count=1)
        if leash.end.is_set():
            return _INTERRUPTED
        if problem := probing.get():
            raise ServerError(problem)
        out.mkdir(parents=True, exist_ok=True)
    except (ServerError, UnknownModel) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --out {out}: {error.strerror}", file=sys.stderr)
        return 2
    energy_before = _energy(bench)
    _load(bench, leash, console)
    traffic = traffic_of(bench.records, energy_before, _energy(bench), options.cost)
    report = Report(
        options=options,
        model=bench.model,
        started=bench.started,
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


def _require_web_port() -> None:
    try:
        socket.create_server((_WEB_HOST, _WEB_PORT)).close()
    except OSError as error:
        raise ServerError(
            f"--web: Locust's UI needs port {_WEB_PORT} of {_WEB_HOST}: {error.strerror}"
        ) from error


def _problem(bench: Bench) -> str | None:
    """Probe; returns why the server cannot be used, as gevent prints a traceback of what is raised."""
    try:
        bench.probe()
    except ServerError as error:
        return str(error)
    if not _is_loopback(bench.options.url):
        bench.notes.append(
            "The server runs on another machine: the cost figures must be those of that machine."
        )
    return None


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _energy(bench: Bench) -> EnergyReading | None:
    # A request is metered moments after its stream ends. And servers hang up on idle connections, so the
    # client of the reading before would not do.
    gevent.sleep(_METERING_SECONDS)
    client = bench.new_client()
    joules = energy_by_source(client)
    client.close()
    return joules


def _load(bench: Bench, leash: Leash, console: Console) -> None:
    """Run the users until the time is up or the leash is pulled; their last requests are finished first."""
    options = bench.options
    environment = Environment(user_classes=[_user_class(bench)], stop_timeout=_GRACE_SECONDS)
    runner = environment.create_local_runner()
    if options.web:
        web = environment.create_web_ui(_WEB_HOST, _WEB_PORT)
        console.print(f"Locust's web UI: http://{_WEB_HOST}:{_WEB_PORT}; Ctrl-C ends and reports")
    runner.start(options.users, spawn_rate=options.users)
    deadline = float("inf") if options.web else time.monotonic() + options.duration_seconds

    def remaining() -> float | None:
        left = deadline - time.monotonic()
        return left if left > 0 and not leash.end.is_set() else None

    show_progress(console, bench.records, options.users, remaining)
    if leash.end.is_set():
        console.print("ending early; requests in flight are finished first")
    bench.stopping = True
    quitting = gevent.spawn(runner.quit)
    gevent.wait([quitting, leash.abandon], count=1)
    if not quitting.ready():
        console.print("not waiting for requests in flight")
        runner.user_greenlets.kill()
        quitting.join()
    bench.abandon()
    if options.web:
        web.stop()
