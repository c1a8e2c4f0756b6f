"""Every Prometheus series: its name, labels and unit.

Labels are bounded: ``model`` is a name of the config (or ``unknown``), ``endpoint`` a route, ``status`` an HTTP
status, ``compared_to`` a model of ``cost.compare_to``; ``priority``, ``phase``, ``part`` and ``state`` are the engine's own words;
``adapter`` is a LoRA adapter's name, ``tenant`` is one that the operator gave a key, ``reason`` one of a few codes of errors;
``gpu`` is NVML's index of a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

UNKNOWN_MODEL = "unknown"

# From a cached prompt on a fast card to a long prompt in a queue.
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80)
# From 1,000 tokens a second down to one.
_TOKEN_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.045,
    0.07,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
)
_DURATION_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_QUEUE_BUCKETS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)


# Fields of an engine's answer: name, series, help, and the label by which the field is a mapping, if it is.
_ENGINE_GAUGES: tuple[tuple[str, ...], ...] = (
    (
        "waiting_by_class",
        "rigserve_requests_queued",
        "Sequences that wait for a slot of the engine.",
        "priority",
    ),
    ("running", "rigserve_sequences_running", "Sequences in the engine's slots."),
    ("kv_used_tokens", "rigserve_kv_cache_used_tokens", "KV cells of running sequences."),
    ("kv_total_tokens", "rigserve_kv_cache_total_tokens", "KV cells in all."),
    (
        "prefix_store_bytes",
        "rigserve_prefix_cache_bytes",
        "Main memory with prefixes whose slot was given away.",
    ),
)
_ENGINE_COUNTERS: tuple[tuple[str, ...], ...] = (
    (
        "step_seconds",
        "rigserve_engine_step_seconds",
        "Time of the engine's steps, by what it was spent on.",
        "part",
    ),
    ("prefix_hit_tokens", "rigserve_prefix_hit_tokens", "Prompt tokens found computed."),
    ("preemptions", "rigserve_preemptions", "Times a sequence gave up its slot for others."),
    ("drafted_tokens", "rigserve_draft_tokens", "Tokens computed on trial (speculation)."),
    ("accepted_tokens", "rigserve_accepted_draft_tokens", "Draft tokens that proved right."),
)


class EngineSeries:
    """What engines count about themselves. One that is down has no series; one that does not count a thing, not that.

    Totals are the engine's: when it is started again they begin at 0, as counters may.
    """

    def __init__(self) -> None:
        # What engines answered last, by model.
        self.answers: Mapping[str, Mapping[str, Any]] = {}

    def collect(self) -> Iterator[Metric]:
        """All series, for the registry."""
        for field, name, text, *label in _ENGINE_GAUGES:
            yield self._filled(GaugeMetricFamily(name, text, labels=("model", *label)), field)
        for field, name, text, *label in _ENGINE_COUNTERS:
            yield self._filled(CounterMetricFamily(name, text, labels=("model", *label)), field)
        yield self._step_rows()
        yield from self._own_families()

    def _filled(
        self, family: GaugeMetricFamily | CounterMetricFamily, field: str
    ) -> GaugeMetricFamily | CounterMetricFamily:
        for model, answer in self.answers.items():
            value = answer.get(field)
            if isinstance(value, Mapping):
                for label, each in value.items():
                    family.add_metric((model, label), each)
            elif value is not None:
                family.add_metric((model,), value)
        return family

    def _own_families(self) -> Iterator[Metric]:
        """The series of engines that have others, under their own names."""
        together: dict[str, Metric] = {}
        for model, answer in self.answers.items():
            for family in answer.get("families", ()):
                told = together.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                told.samples += [
                    sample._replace(labels={"model": model, **sample.labels})
                    for sample in family.samples
                ]
        yield from together.values()

    def _step_rows(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily(
            "rigserve_engine_step_rows",
            "Tokens computed in a step of the engine, drafts included; the count is that of steps.",
            labels=("model", "phase"),
        )
        for model, answer in self.answers.items():
            for phase in ("prefill", "decode"):
                steps = answer.get(f"{phase}_steps")
                if steps is not None:
                    up_to = list(zip(steps, accumulate(steps.values()), strict=True))
                    family.add_metric((model, phase), up_to, answer[f"{phase}_tokens"])
        return family


# Fields of a card's reading, and of the host's, as above.
_GPU_GAUGES: tuple[tuple[str, ...], ...] = (
    ("utilization", "rigserve_gpu_utilization_ratio", "Share of time in which the card computed."),
    (
        "memory_utilization",
        "rigserve_gpu_memory_utilization_ratio",
        "Share of time in which the card's memory was read or written.",
    ),
    ("memory_used_bytes", "rigserve_gpu_memory_used_bytes", "Memory in use, by any process."),
    ("memory_total_bytes", "rigserve_gpu_memory_total_bytes", "Memory of the card."),
    ("power_watts", "rigserve_gpu_power_watts", "What the card draws."),
    ("power_limit_watts", "rigserve_gpu_power_limit_watts", "What it may draw."),
    ("temperature_celsius", "rigserve_gpu_temperature_celsius", "Temperature of the chip."),
    (
        "slowdown_celsius",
        "rigserve_gpu_slowdown_celsius",
        "Temperature from which on the card lowers its clocks.",
    ),
    ("clock_hertz", "rigserve_gpu_clock_hertz", "Clocks: sm, memory.", "domain"),
    (
        "throttled",
        "rigserve_gpu_throttled",
        "1 while the clocks are held down: power_cap, thermal, hardware_thermal, hardware_power_brake.",
        "reason",
    ),
    ("fan_ratio", "rigserve_gpu_fan_ratio", "Speed of the fan, of its highest."),
    ("processes", "rigserve_gpu_processes", "Processes that compute on the card."),
)
_GPU_COUNTERS: tuple[tuple[str, ...], ...] = (
    ("energy_joules", "rigserve_gpu_energy_joules", "Energy since the driver was loaded."),
    ("pcie_replays", "rigserve_gpu_pcie_replays", "Packets that PCIe had to send again: errors."),
)
_HOST_GAUGES: tuple[tuple[str, ...], ...] = (
    ("memory_total_bytes", "rigserve_host_memory_total_bytes", "Main memory."),
    (
        "memory_available_bytes",
        "rigserve_host_memory_available_bytes",
        "Main memory that programs can still have.",
    ),
    ("disk_free_bytes", "rigserve_disk_free_bytes", "Free disk space below a folder.", "folder"),
    ("disk_total_bytes", "rigserve_disk_total_bytes", "Size of that disk.", "folder"),
)
_HOST_COUNTERS: tuple[tuple[str, ...], ...] = (
    ("cpu_seconds", "rigserve_host_cpu_seconds", "Time of all CPUs, by what it went to.", "mode"),
)


class Readings(Protocol):
    """What is read of the machine; see ``serving.hardware.telemetry``."""

    @property
    def gpus(self) -> Mapping[str, Any]:
        """Each card's reading, by its index; none where there is no card."""

    @property
    def host(self) -> Any:
        """The machine's."""


class MachineSeries:
    """The cards' and the host's. What is not told has no series, nor has a card that is not there."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        """All series, for the registry."""
        gpus, host = self._readings.gpus, self._readings.host
        if gpus:
            info = InfoMetricFamily("rigserve_gpu", "A card, and its driver.", labels=("gpu",))
            for index, gpu in gpus.items():
                info.add_metric((index,), dict(gpu.info))
            yield info
        by_gpu = [((index,), gpu) for index, gpu in gpus.items()]
        yield from _families(_GPU_GAUGES, GaugeMetricFamily, ("gpu",), by_gpu)
        yield from _families(_GPU_COUNTERS, CounterMetricFamily, ("gpu",), by_gpu)
        yield from _families(_HOST_GAUGES, GaugeMetricFamily, (), [((), host)])
        yield from _families(_HOST_COUNTERS, CounterMetricFamily, (), [((), host)])


def _families(
    rows: tuple[tuple[str, ...], ...],
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    labels: tuple[str, ...],
    readings: Sequence[tuple[tuple[str, ...], Any]],
) -> Iterator[Metric]:
    for field, name, text, *label in rows:
        family = kind(name, text, labels=(*labels, *label))
        for values, reading in readings:
            told = getattr(reading, field)
            if isinstance(told, Mapping):
                for each, value in told.items():
                    family.add_metric((*values, each), value)
            elif told is not None:
                family.add_metric(values, told)
        if family.samples:
            yield family


class Metrics:
    """The gateway's series, in a registry of their own."""

    def __init__(self) -> None:
        # Creation times would double the series and say nothing that rate() needs.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self.engines = EngineSeries()
        self.registry.register(self.engines)
        self.requests = self._counter(
            "rigserve_requests", "Requests answered.", "model", "endpoint", "status"
        )
        self.in_flight = self._gauge(
            "rigserve_requests_in_flight", "Requests being answered now.", "model"
        )
        self.engine_ready = self._gauge(
            "rigserve_engine_ready", "1 while the model's engine takes requests.", "model"
        )
        self.engine_restarts = self._gauge(
            "rigserve_engine_restarts", "Times the model's engine was started again.", "model"
        )
        self.engine_state = self._gauge(
            "rigserve_engine_state",
            "1 for the state that the model's engine is in.",
            "model",
            "state",
        )
        self.engine_memory = self._gauge(
            "rigserve_engine_memory_bytes",
            "Memory set aside for the model's engine, as estimated, then as measured.",
            "model",
            "device",
        )
        self.prompt_tokens = self._counter(
            "rigserve_prompt_tokens", "Prompt tokens, cached ones included.", "model"
        )
        self.cached_tokens = self._counter(
            "rigserve_cached_tokens", "Prompt tokens found in the KV cache.", "model"
        )
        self.completion_tokens = self._counter(
            "rigserve_completion_tokens", "Generated tokens.", "model"
        )
        self.ttft = self._histogram(
            "rigserve_time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS
        )
        self.itl = self._histogram(
            "rigserve_inter_token_latency_seconds",
            "Gap between streamed chunks, per chunk.",
            _TOKEN_BUCKETS,
        )
        self.tpot = self._histogram(
            "rigserve_time_per_output_token_seconds",
            "Time after the first token over the tokens after the first, by request.",
            _TOKEN_BUCKETS,
        )
        self.duration = self._histogram(
            "rigserve_request_duration_seconds", "Arrival to last byte.", _DURATION_BUCKETS
        )
        self.queue_time = self._histogram(
            "rigserve_queue_time_seconds", "Arrival to a slot of the engine.", _QUEUE_BUCKETS
        )
        self.admission_waiting = self._gauge(
            "rigserve_admission_waiting",
            "Requests that wait in the gateway for their model.",
            "model",
            "priority",
        )
        self.admission_wait = self._histogram(
            "rigserve_admission_wait_seconds",
            "How long requests waited in the gateway before they went to their engine.",
            _QUEUE_BUCKETS,
        )
        self.admission_refusals = self._counter(
            "rigserve_admission_refusals",
            "Requests refused because of the queue, a deadline, or a model that cannot be loaded.",
            "model",
            "reason",
        )
        self.energy = self._counter(
            "rigserve_energy_joules",
            "Energy charged to requests; source says who measured it, or that it is estimated.",
            "model",
            "source",
        )
        self.idle_energy = self._counter(
            "rigserve_idle_energy_joules",
            "Of the energy charged to requests: what the rig draws without them, too.",
            "model",
            "source",
        )
        self.cost = self._counter(
            "rigserve_cost_usd",
            "Cost of requests: energy, idle, hardware; api is what other servers ask for.",
            "model",
            "part",
        )
        self.commercial_cost = self._counter(
            "rigserve_commercial_cost_usd",
            "What the same tokens would have cost at a commercial model.",
            "model",
            "compared_to",
        )

        self.passed_on = self._counter(
            "rigserve_route_passed_on",
            "Times that a model did not take a route's request, before its answer began.",
            "route",
            "model",
            "reason",
        )
        self.breaker_state = self._gauge(
            "rigserve_breaker_state",
            "1 for the state of a remote's circuit breaker: closed, open, half_open.",
            "model",
            "state",
        )
        self.api_budget = self._gauge(
            "rigserve_api_budget_usd",
            "The budget of a model that costs money; period is day or month.",
            "model",
            "period",
        )
        self.api_spent = self._gauge(
            "rigserve_api_spent_usd",
            "What of it is spent, without what is under way.",
            "model",
            "period",
        )

        self.refusals = self._counter(
            "rigserve_refusals",
            "Requests that their API key, or the lack of one, forbade.",
            "reason",
        )
        self.adapter_requests = self._counter(
            "rigserve_adapter_requests",
            "Requests for a LoRA adapter; its model's series count them, too.",
            "model",
            "adapter",
            "status",
        )
        self.adapter_tokens = self._counter(
            "rigserve_adapter_tokens",
            "Tokens of an adapter: prompt, completion.",
            "model",
            "adapter",
            "kind",
        )
        self.adapter_cost = self._counter(
            "rigserve_adapter_cost_usd", "Cost of an adapter's requests.", "model", "adapter"
        )
        self.tenant_requests = self._counter(
            "rigserve_tenant_requests",
            "Requests with an API key, by their tenant.",
            "tenant",
            "status",
        )
        self.tenant_tokens = self._counter(
            "rigserve_tenant_tokens", "Tokens of a tenant: prompt, completion.", "tenant", "kind"
        )
        self.tenant_cost = self._counter(
            "rigserve_tenant_cost_usd", "Cost of a tenant's requests.", "tenant"
        )

        self.ledger_waiting = Gauge(
            "rigserve_ledger_waiting_rows",
            "Requests whose usage is not in the ledger yet; many while it cannot be written.",
            registry=self.registry,
        )
        self.certificate_expiry = self._gauge(
            "rigserve_tls_certificate_expiry_timestamp_seconds",
            "Until when the certificate in use is valid, in Unix time; absent without TLS.",
            "file",
        )
        self.config_reload_ok = Gauge(
            "rigserve_config_last_reload_successful",
            "1 if the config file as it was last read is in use.",
            registry=self.registry,
        )
        self.config_reload_time = Gauge(
            "rigserve_config_last_reload_success_timestamp_seconds",
            "When a config was last taken up.",
            registry=self.registry,
        )

    def watch_machine(self, readings: Readings) -> None:
        """Show the last of ``readings`` from now on."""
        self.registry.register(MachineSeries(readings))

    def reloaded(self, *, ok: bool, at_unix: float) -> None:
        """The config was read again; ``ok`` if it is in use now."""
        self.config_reload_ok.set(1 if ok else 0)
        if ok:
            self.config_reload_time.set(at_unix)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ("model",), buckets=buckets, registry=self.registry)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)
