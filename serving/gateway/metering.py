"""Turns each finished request into a ledger row and into metrics."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from serving.config import AnyModel, RemoteModel
from serving.cost.ledger import Ledger, UsageRecord
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook
from serving.gateway.access_log import tell_of_metered
from serving.gateway.bill import Bill, Comparison
from serving.gateway.identity import Identity
from serving.gateway.limits import Reservation
from serving.gateway.sharing import SharedRig, SharedTime
from serving.gateway.spending import Purchase
from serving.gateway.tracing import Trace, Tracing
from serving.metrics import Metrics
from serving.protocol.requests import ModelRequest
from serving.protocol.responses import Timings, Usage

_TIMINGS = {each.name for each in fields(Timings)}
# No context is as long.
_MOST_TOKENS = 2**31 - 1
# From engines that know only how long a request took, and not its share of their steps.
_OWN_TIMINGS = {"prefill_seconds", "decode_seconds"}
_QUEUE = "queue_seconds"


class Draw(Protocol):
    """The mean of a draw, what it would have been without work, and who has measured it, or ``estimated``."""

    @property
    def watts(self) -> float:
        """The mean."""

    @property
    def idle_watts(self) -> float:
        """Of that, what is drawn without work, too."""

    @property
    def source(self) -> str:
        """Such as ``nvml``, ``rapl``, ``shelly``, or ``estimated``."""


class PowerSource(Protocol):
    """An energy meter, as far as metering cares."""

    def draw(self, started_monotonic: float, ended_monotonic: float) -> Draw:
        """The rig's mean draw in a window of time."""


@dataclass(slots=True)
class Request:
    """A request under way, as the gateway sees it. Moments are ``time.monotonic()``.

    Of its time, ``queue_seconds`` went by before it was sent to its engine.

    The ledger knows a request by its LoRA ``adapter`` if it has one; metrics by the base model, and some by both.
    """

    id: str
    endpoint: str
    model: AnyModel
    adapter: str | None
    user: str
    identity: Identity
    reservation: Reservation | None
    streamed: bool
    trace: Trace | None = None
    # Whether it has the trace to itself: a batch's line, or one more try after the first was answered.
    began_trace: bool = False
    # The route that was asked for, if one was, and as what the model serves it.
    route: str = "-"
    served_as: str = "-"
    service_tier: str = "default"
    purchase: Purchase | None = None
    queue_seconds: float = 0.0
    arrived_unix: float = field(default_factory=time.time)
    arrived_at: float = field(default_factory=time.monotonic)
    # By which its share of the engine's time is known, and its engine's of the rig's.
    entered: float = 0.0
    entered_rig: tuple[float, float] = (0.0, 0.0)
    first_chunk_at: float | None = None
    last_chunk_at: float | None = None

    @property
    def sent_at(self) -> float:
        """When it went to its engine."""
        return self.arrived_at + self.queue_seconds


class Meter:
    """Writes down what requests used and what that cost."""

    def __init__(
        self,
        ledger: Ledger,
        metrics: Metrics,
        cost: CostModel,
        prices: PriceBook,
        power: PowerSource,
        tracing: Tracing | None = None,
        *,
        is_one_rig: bool = True,
    ) -> None:
        """``is_one_rig``: all engines share the hardware that ``cost`` knows; else each has as much for itself."""
        self._ledger = ledger
        self._metrics = metrics
        self._cost = cost
        self._prices = prices
        self._power = power
        self._tracing = tracing
        self._shared_times: defaultdict[str, SharedTime] = defaultdict(SharedTime)
        self._is_one_rig = is_one_rig
        self._rigs: defaultdict[str, SharedRig] = defaultdict(SharedRig)

    def configure(self, cost: CostModel, prices: PriceBook) -> None:
        """Price what ends from now on in another way."""
        self._cost = cost
        self._prices = prices

    def started(self, request: Request, body: ModelRequest) -> None:
        """A request goes to its engine."""
        self._metrics.in_flight.labels(request.model.served_name).inc()
        request.entered = self._shared_times[request.model.name].enter()
        if not isinstance(request.model, RemoteModel):
            request.entered_rig = self._rig_of(request).enter(request.model.name)
        if self._tracing is None:
            return
        # A batch's lines have no trace yet, and who asked for work in the background has been answered.
        if request.trace is None or request.trace.has_ended:
            request.trace = self._tracing.begin(request.endpoint, above=request.trace)
            request.began_trace = True
        if request.trace is not None:
            request.trace.asked(body)

    def streamed(self, request: Request, chunks: int) -> None:
        """``chunks`` with generated text have arrived together."""
        if not chunks:
            return
        now = time.monotonic()
        if request.last_chunk_at is None:
            request.first_chunk_at = now
            self._metrics.ttft.labels(request.model.served_name).observe(now - request.arrived_at)
        else:
            gap = (now - request.last_chunk_at) / chunks
            itl = self._metrics.itl.labels(request.model.served_name)
            for _ in range(chunks):
                itl.observe(gap)
        request.last_chunk_at = now

    def withdrawn(self, request: Request) -> None:
        """A request that was started is another model's after all: it does not count here."""
        self._shared_times[request.model.name].leave(request.entered)
        if not isinstance(request.model, RemoteModel):
            self._rig_of(request).leave(request.model.name, request.entered_rig)
        self._metrics.in_flight.labels(request.model.served_name).dec()
        if request.trace is not None and request.began_trace:
            request.trace.answered(503)

    def passed_on(self, route: str, model: str, reason: str) -> None:
        """A model did not take a route's request, which may go to another; ``reason`` is the error's code."""
        self._metrics.passed_on.labels(route, model, reason).inc()

    def unmetered(self, model: str, endpoint: str, status: int) -> None:
        """A request ended that used nothing: it reached no engine, or asked for no tokens."""
        self._metrics.requests.labels(model, endpoint, str(status)).inc()

    def refused(self, reason: str) -> None:
        """A request was turned away because of its key; ``reason`` is the error's code."""
        self._metrics.refusals.labels(reason).inc()

    def finished(
        self, request: Request, status: int, final: Mapping[str, Any] | None, chunks: int = 0
    ) -> UsageRecord:
        """A request that was started has ended; gives what the ledger has of it.

        ``final`` holds the engine's ``usage`` and ``timings``. Without it, as when an engine dies, each
        of the ``chunks`` that arrived is counted as a token and the time on the clock as the engine's;
        the ledger marks both as estimated.
        """
        ended_at = time.monotonic()
        usage = _usage(final)
        share_seconds = self._shared_times[request.model.name].leave(request.entered)
        measured = _timings(final, share_seconds)
        timings = measured or _observed(request, ended_at)
        is_remote = isinstance(request.model, RemoteModel)
        # A remote kept none of this rig's hardware busy; several models of its own share it.
        share = 0.0
        if not is_remote:
            share = self._rig_of(request).leave(request.model.name, request.entered_rig)
        prefill_busy_seconds = share * timings.prefill_busy_seconds
        decode_busy_seconds = share * timings.decode_busy_seconds
        busy_seconds = prefill_busy_seconds + decode_busy_seconds
        draw = self._power.draw(request.sent_at, ended_at)
        joules = busy_seconds * draw.watts
        parts = self._cost.parts(busy_seconds, joules, request.arrived_unix)
        record = UsageRecord(
            started_at=request.arrived_unix,
            request_id=request.id,
            user=request.user,
            model=request.adapter or request.model.served_name,
            engine=request.model.engine,
            endpoint=request.endpoint,
            status=status,
            streamed=request.streamed,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=usage.cached_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else chunks,
            tokens_source="engine" if usage else "estimated",
            queue_seconds=request.queue_seconds + timings.queue_seconds,
            prefill_seconds=timings.prefill_seconds,
            decode_seconds=timings.decode_seconds,
            prefill_busy_seconds=prefill_busy_seconds,
            decode_busy_seconds=decode_busy_seconds,
            timing_source="engine" if measured else "estimated",
            energy_joules=joules,
            energy_source="none" if is_remote else draw.source,
            energy_usd=parts.energy_usd,
            idle_usd=parts.idle_usd,
            hardware_usd=parts.hardware_usd,
            key_id=request.identity.key_id or "-",
            tenant=request.identity.tenant,
            api_usd=request.purchase.usd(usage) if request.purchase else 0.0,
            route=request.route,
            served_as=request.served_as,
            base_model=request.model.served_name if request.adapter else "-",
            service_tier=request.service_tier,
            idle_joules=busy_seconds * draw.idle_watts,
        )
        if request.purchase:
            request.purchase.settle(record.api_usd)
        self._ledger.append(record)
        first_at, arrived_at = request.first_chunk_at, request.arrived_at
        ttft_seconds = None if first_at is None else first_at - arrived_at
        tell_of_metered(record, request.identity.key_name, ttft_seconds, ended_at - arrived_at)
        if request.trace is not None:
            request.trace.finished(record, request.identity.key_name, ttft_seconds)
        self._count(record, request, ended_at)
        return record

    def bill(self, record: UsageRecord) -> Bill:
        """What a request cost here, and at the first model of `cost.compare_to`."""
        elsewhere = None
        if self._prices.references:
            reference = self._prices.references[0]
            elsewhere = Comparison(reference, self._usd_at(reference, record))
        sources = [record.tokens_source]
        if record.energy_source != "none":
            sources += [record.timing_source, record.energy_source]
        return Bill(
            usd=record.usd,
            energy_usd=record.energy_usd,
            estimated="estimated" in sources,
            elsewhere=elsewhere,
        )

    def _count(self, record: UsageRecord, request: Request, ended_at: float) -> None:
        metrics, model = self._metrics, request.model.served_name
        metrics.in_flight.labels(model).dec()
        metrics.requests.labels(model, record.endpoint, str(record.status)).inc()
        metrics.prompt_tokens.labels(model).inc(record.prompt_tokens)
        metrics.cached_tokens.labels(model).inc(record.cached_tokens)
        metrics.completion_tokens.labels(model).inc(record.completion_tokens)
        if isinstance(request.model, RemoteModel):
            metrics.cost.labels(model, "api").inc(record.api_usd)
        else:
            metrics.energy.labels(model, record.energy_source).inc(record.energy_joules)
            metrics.idle_energy.labels(model, record.energy_source).inc(record.idle_joules)
            metrics.cost.labels(model, "energy").inc(record.energy_usd)
            metrics.cost.labels(model, "idle").inc(record.idle_usd)
            metrics.cost.labels(model, "hardware").inc(record.hardware_usd)
        if record.status == 200:
            metrics.duration.labels(model).observe(ended_at - request.arrived_at)
            metrics.queue_time.labels(model).observe(record.queue_seconds)
            if record.completion_tokens > 1:
                tpot = record.decode_seconds / (record.completion_tokens - 1)
                metrics.tpot.labels(model).observe(tpot)
        if request.adapter is not None:
            adapter = (model, request.adapter)
            metrics.adapter_requests.labels(*adapter, str(record.status)).inc()
            metrics.adapter_tokens.labels(*adapter, "prompt").inc(record.prompt_tokens)
            metrics.adapter_tokens.labels(*adapter, "completion").inc(record.completion_tokens)
            metrics.adapter_cost.labels(*adapter).inc(record.usd)
        if request.identity.key_id is not None:
            tenant = record.tenant
            metrics.tenant_requests.labels(tenant, str(record.status)).inc()
            metrics.tenant_tokens.labels(tenant, "prompt").inc(record.prompt_tokens)
            metrics.tenant_tokens.labels(tenant, "completion").inc(record.completion_tokens)
            metrics.tenant_cost.labels(tenant).inc(record.usd)
        for reference in self._prices.references:
            metrics.commercial_cost.labels(model, reference).inc(self._usd_at(reference, record))

    def _rig_of(self, request: Request) -> SharedRig:
        return self._rigs["" if self._is_one_rig else request.model.name]

    def _usd_at(self, reference: str, record: UsageRecord) -> float:
        return self._prices.usd(
            *(reference, record.prompt_tokens, record.cached_tokens, record.completion_tokens),
            service_tier=record.service_tier,
        )


def _usage(final: Mapping[str, Any] | None) -> Usage | None:
    """What an engine tells of a request's tokens; None if that is nothing to rely on."""
    usage = (final or {}).get("usage")
    prompt_tokens = _count(usage, "prompt_tokens")
    # Vectors come without.
    completion_tokens = _count(usage, "completion_tokens", absent=0)
    if not isinstance(usage, dict) or prompt_tokens is None or completion_tokens is None:
        return None
    cached_tokens = _count(usage.get("prompt_tokens_details"), "cached_tokens") or 0
    # More than all of it would make a request cost less than nothing.
    return Usage(prompt_tokens, min(cached_tokens, prompt_tokens), completion_tokens)


def _count(usage: object, name: str, absent: int | None = None) -> int | None:
    """A number of tokens as an engine tells it; None for what is none."""
    value = usage.get(name) if isinstance(usage, dict) else None
    if value is None:
        return absent
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def _timings(final: Mapping[str, Any] | None, share_seconds: float) -> Timings | None:
    timings = (final or {}).get("timings")
    if not isinstance(timings, dict):
        return None
    if not all(type(each) in (int, float) and each >= 0 for each in timings.values()):
        return None
    if timings.keys() - {_QUEUE} == _OWN_TIMINGS:
        prefill, decode = timings["prefill_seconds"], timings["decode_seconds"]
        # Whoever reads slowly keeps the engine busy for no longer.
        share = min(1.0, share_seconds / max(prefill + decode, 1e-9))
        return Timings(timings.get(_QUEUE, 0.0), prefill, decode, share * prefill, share * decode)
    # Other engines have timings of other kinds.
    if timings.keys() != _TIMINGS:
        return None
    return Timings(**timings)


def _observed(request: Request, ended_at: float) -> Timings:
    first = request.first_chunk_at or ended_at
    prefill, decode = first - request.sent_at, ended_at - first
    return Timings(0.0, prefill, decode, prefill, decode)
