"""One bench from its first probe to its report. Runs in a process that gevent has taken over."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import gevent
from locust.exception import RPCError
from rich.console import Console

from loadtest.client import Client, ServerError
from loadtest.conductor import Conductor, Orders
from loadtest.crowd import Crowd, quiet_logs, work_for
from loadtest.files import write_report
from loadtest.gate import (
    GateError,
    Objective,
    compare_runs,
    judge,
    load_baseline,
    parse_objective,
)
from loadtest.measures import by_tenant, marked, summarize, totals_of
from loadtest.options import BenchOptions, Join
from loadtest.pricing import EnergyReading, energy_by_source, energy_notes, traffic_of
from loadtest.probe import Findings, Probe
from loadtest.processes import Leash, free_port, local_workers
from loadtest.records import RequestRecord
from loadtest.report import VERSION, Report, StageReport, host_facts
from loadtest.scenario import Closed, Replay, ScenarioError
from loadtest.stages import Stage
from loadtest.station import Setup, clock_since
from loadtest.terminal import Progress, show_report
from loadtest.traces import TraceRequest, read_trace
from loadtest.watch import health, raise_file_limit
from loadtest.web import WEB_HOST, WEB_PORT, serve_web
from serving.cost.comparison import compare
from serving.cost.peers import book_to_compare_with
from serving.cost.price_data import PriceDataError, installed, price_data
from serving.cost.prices import PriceBook, UnknownModel

_METERING_SECONDS = 0.3
_JOIN_SECONDS = 30.0
INTERRUPTED, BAD_INPUT, GATE_FAILED = 130, 2, 3


def join(options: Join) -> int:
    """Be a worker until the bench has ended; returns the exit status."""
    quiet_logs()
    raise_file_limit()
    _collect_less_garbage()
    leash = Leash()
    key = options.api_key or os.environ.get("OPENAI_API_KEY")
    if work_for(options.host, options.port, key, leash.end.is_set) or leash.end.is_set():
        return 0
    print(
        f"error: --join {options.host}:{options.port}: the bench there has all the workers that it was told to "
        "wait for; see its --remote-workers",
        file=sys.stderr,
    )
    return BAD_INPUT


def run(options: BenchOptions) -> int:
    """Probe, load, report; returns the exit status."""
    quiet_logs()
    console = Console()
    leash = Leash()
    out = options.out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    api_key = options.api_key or os.environ.get("OPENAI_API_KEY")
    epoch = time.time()
    try:
        data = price_data(options.prices_dir) if options.prices_dir else installed()
        # What cannot be priced is told before the load, not after it.
        PriceBook(options.cost.compare_to, overrides=options.cost.prices, data=data)
        objectives = [parse_objective(text) for text in options.slo]
        baseline = None
        if options.baseline is not None:
            baseline = load_baseline(options.baseline, VERSION)
        trace = _trace(options)
        if options.web:
            _require_web_port(options)
        probing = gevent.spawn(_probe, options, api_key, epoch)
        gevent.wait([probing, leash.end], count=1)
        if leash.end.is_set():
            return INTERRUPTED
        found = probing.get()
        if isinstance(found, ServerError):
            raise found
        prices = book_to_compare_with(options.cost, data, lambda: found.model)
        out.mkdir(parents=True, exist_ok=True)
    except (GateError, ScenarioError, PriceDataError, ServerError, UnknownModel) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: --out {out}: {error.strerror}", file=sys.stderr)
        return BAD_INPUT
    try:
        report = _report_of(options, found, trace, epoch, leash, console, prices)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if report is None:
        return INTERRUPTED
    report = _judged(report, objectives)
    if baseline is not None:
        assert options.baseline is not None
        try:
            comparison = compare_runs(report.as_json(), baseline, options.baseline.name)
        except GateError as error:
            print(f"error: {error}", file=sys.stderr)
            write_report(report, out)
            return BAD_INPUT
        report = replace(
            report, comparison=comparison, verdicts=report.verdicts + comparison.verdicts
        )
    try:
        write_report(report, out)
    except OSError as error:
        print(
            f"error: --out {out}: {error.strerror}; this is what was to be in it:", file=sys.stderr
        )
        show_report(console, report, out)
        return BAD_INPUT
    show_report(console, report, out)
    if report.totals.requests <= report.totals.errors:
        return 1
    return 0 if report.passed else GATE_FAILED


def _probe(options: BenchOptions, api_key: str | None, epoch: float) -> Findings | ServerError:
    """The findings, or why there are none, as gevent prints a traceback of what is raised."""
    try:
        probe = Probe(options.url, options.model, api_key, options.scenario.traffic, epoch)
        return probe.findings()
    except ServerError as error:
        return error


def _trace(options: BenchOptions) -> tuple[TraceRequest, ...]:
    load = options.scenario.load
    if not isinstance(load, Replay):
        return ()
    return tuple(read_trace(Path(load.trace), load.most_requests))


def _require_web_port(options: BenchOptions) -> None:
    if not isinstance(options.scenario.load, Closed):
        raise ServerError(
            "--web: users are steered by hand there; it needs a scenario of kind closed"
        )
    try:
        socket.create_server((WEB_HOST, WEB_PORT)).close()
    except OSError as error:
        raise ServerError(
            f"--web: Locust's UI needs port {WEB_PORT} of {WEB_HOST}: {error.strerror}"
        ) from error


def _report_of(
    options: BenchOptions,
    found: Findings,
    trace: tuple[TraceRequest, ...],
    epoch: float,
    leash: Leash,
    console: Console,
    prices: tuple[PriceBook, str],
) -> Report | None:
    """Run the load and measure it; None if it was interrupted before it began."""
    started = datetime.fromtimestamp(epoch).astimezone()
    raise_file_limit()
    scenario, load = options.scenario, options.scenario.load
    api_key = options.api_key or os.environ.get("OPENAI_API_KEY")
    setup = Setup(
        url=options.url,
        model=found.model,
        traffic=scenario.traffic,
        gauges=found.gauges,
        ignore_eos=found.ignore_eos,
        seed=options.seed,
        epoch=epoch,
        workers=max(options.workers + options.remote_workers, 1),
        trace=trace,
        speed=load.speed if isinstance(load, Replay) else 1.0,
    )
    clock = clock_since(epoch)
    notes = list(found.notes)
    with _crowd(options, setup, api_key, leash, console) as crowd:
        if crowd is None:
            return None
        crowd.set_up(setup)
        _collect_less_garbage()
        energy_before = _energy(options.url, api_key)
        with Progress(console, crowd.collector, clock) as progress:
            conductor = Conductor(
                crowd, scenario, clock, Orders(leash.end, leash.abandon), progress.show
            )
            if options.web:
                assert isinstance(load, Closed)
                with serve_web(crowd, console, clock):
                    conductor.run_until_ended(load.users)
            else:
                trace_seconds = trace[-1].at_seconds / setup.speed if trace else 0.0
                conductor.run(trace_seconds + 1e-3)
        energy_after = _energy(options.url, api_key)
        if lost := max(crowd.lost(), setup.workers - crowd.connected):
            notes.append(
                f"{lost} worker processes were lost on the way: their last requests are missing."
            )
        crowd.quit()
    if leash.end.is_set() and not options.web:
        notes.append("The bench was ended early.")
    records = marked([*found.records, *crowd.collector.records], conductor.stages)
    of_load = [record for record in records if not record.warmup]
    # The first requests may be metered after the first look at the meter.
    notes += energy_notes(energy_before, energy_after, len(records))
    traffic = traffic_of(records, energy_before, energy_after, options.cost)
    return Report(
        options=options,
        model=found.model,
        started=started,
        host=host_facts(),
        notes=tuple(notes),
        records=tuple(records),
        samples=tuple(sorted(crowd.collector.samples, key=lambda sample: sample.at)),
        stages=tuple(_stage_report(stage, records, crowd, options) for stage in conductor.stages),
        knee=conductor.knee,
        totals=totals_of(of_load),
        totals_with_warmup=totals_of(records),
        cost=compare(traffic, options.cost, *prices) if traffic else None,
    )


def _stage_report(
    stage: Stage, records: list[RequestRecord], crowd: Crowd, options: BenchOptions
) -> StageReport:
    of_load = [record for record in records if not record.warmup]
    mine = [record for record in of_load if record.stage == stage.index]
    slo = options.scenario.slo
    summary = summarize(of_load, stage.window, slo)
    itl = summary.itl_seconds.p50 if summary.itl_seconds else None
    return StageReport(
        stage=stage,
        summary=summary,
        tenants=by_tenant(of_load, stage.window, slo),
        client=health(
            crowd.collector.samples, mine, stage.window, itl, due_times=stage.users is None
        ),
    )


def _judged(report: Report, objectives: list[Objective]) -> Report:
    """With a verdict for each condition: at the knee of a sweep, else at every stage."""
    judged = [report.headline] if report.knee is not None else list(report.stages)
    verdicts = tuple(
        judge(objective, one.summary, one.stage.label) for one in judged for objective in objectives
    )
    return replace(report, verdicts=verdicts)


@contextlib.contextmanager
def _crowd(
    options: BenchOptions, setup: Setup, api_key: str | None, leash: Leash, console: Console
) -> Iterator[Crowd | None]:
    """The processes that send, once all are there; None if it was interrupted before."""
    if not options.workers + options.remote_workers:
        yield Crowd(api_key, None, 1)
        return
    host, port = options.bind or ("127.0.0.1", free_port())
    try:
        crowd = Crowd(api_key, (host, port), setup.workers)
    except RPCError as error:
        raise ServerError(f"--bind {host}:{port}: {error}") from error
    if options.remote_workers:
        console.print(
            f"waiting for {options.remote_workers} workers; start each with: "
            f"rigserve bench --join {host}:{port}"
        )
    joined = "127.0.0.1" if host in ("0.0.0.0", "*", "::") else host  # noqa: S104 - compared, not bound
    with local_workers(options.workers, joined, port, api_key) as lost:
        crowd.lost = lost
        deadline = time.monotonic() + _JOIN_SECONDS
        while crowd.connected < setup.workers and not leash.end.is_set():
            if lost() or (time.monotonic() > deadline and not options.remote_workers):
                raise ServerError("the worker processes do not start; what they said is above")
            gevent.sleep(0.1)
        if crowd.connected > setup.workers:
            raise ServerError(
                f"{crowd.connected} workers have joined, and {setup.workers} were to; see --remote-workers"
            )
        yield None if leash.end.is_set() else crowd


def _energy(url: str, api_key: str | None) -> EnergyReading | None:
    # A request is metered moments after its stream ends.
    gevent.sleep(_METERING_SECONDS)
    client = Client(url, api_key)
    joules = energy_by_source(client)
    client.close()
    return joules


def _collect_less_garbage() -> None:
    """A full collection over all records would make every clock late; they hold no cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
