"""The client watches itself: where it was the bottleneck, its figures are not the server's."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.measures import Window
from loadtest.records import RequestRecord

PERIOD_SECONDS = 0.02
_SAMPLE_SECONDS = 1.0
_BUSY_CPU_SHARE = 0.9
# A stamp that is late by so much of an inter-token latency, or so long anyhow, is a wrong one.
_LATE_SHARE_OF_ITL = 0.1
_LATE_SECONDS = 0.005
_LATE_START_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class WatchSample:
    """One second of a client process: its share of one core, and how late its event loop was."""

    at: float
    worker: int
    cpu_share: float
    lag_mean_seconds: float
    lag_max_seconds: float


@dataclass(frozen=True, slots=True)
class ClientHealth:
    """The busiest client process during a stage's window; ``limits`` are the reasons to doubt the stage.

    ``late_start_p99_seconds`` is between when a request was due and when it was sent.
    """

    processes: int
    cpu_share: float | None
    lag_mean_seconds: float | None
    lag_max_seconds: float | None
    late_start_p99_seconds: float | None
    limits: tuple[str, ...]


class Watch:
    """Takes samples for as long as :meth:`run` is left running, in the event loop that it watches."""

    def __init__(self, worker: int, clock: Callable[[], float]) -> None:
        self.worker = worker
        self.samples: list[WatchSample] = []
        self._clock = clock

    def run(self, sleep: Callable[[float], object]) -> None:
        """Never returns; ``sleep`` must yield to the event loop."""
        while True:
            begun, cpu = time.perf_counter(), time.process_time()
            lags: list[float] = []
            while (now := time.perf_counter()) - begun < _SAMPLE_SECONDS:
                sleep(PERIOD_SECONDS)
                lags.append(max(time.perf_counter() - now - PERIOD_SECONDS, 0.0))
            self.samples.append(
                WatchSample(
                    at=self._clock(),
                    worker=self.worker,
                    cpu_share=(time.process_time() - cpu) / (time.perf_counter() - begun),
                    lag_mean_seconds=sum(lags) / len(lags),
                    lag_max_seconds=max(lags),
                )
            )


def health(
    samples: Sequence[WatchSample],
    records: Sequence[RequestRecord],
    window: Window,
    itl_seconds: float | None,
    *,
    due_times: bool,
) -> ClientHealth:
    """Judge the client during a window. ``due_times``: whether requests were due at fixed moments."""
    inside = [
        sample for sample in samples if window[0] <= sample.at - _SAMPLE_SECONDS / 2 < window[1]
    ]
    workers = {sample.worker for sample in inside}
    limits: list[str] = []
    cpu = lag = worst = None
    if inside:
        cpu = max(_mean(s.cpu_share for s in inside if s.worker == worker) for worker in workers)
        lag = max(
            _mean(s.lag_mean_seconds for s in inside if s.worker == worker) for worker in workers
        )
        worst = max(sample.lag_max_seconds for sample in inside)
        if cpu >= _BUSY_CPU_SHARE:
            limits.append(f"a client process took {cpu:.0%} of its core; use more --workers")
        allowed = max(_LATE_SECONDS, _LATE_SHARE_OF_ITL * (itl_seconds or 0.0))
        if lag > allowed:
            limits.append(
                f"the client's event loop was {lag * 1e3:.1f} ms late on average (allowed: "
                f"{allowed * 1e3:.1f} ms); its machine has too little CPU for it"
            )
    measured = [record for record in records if record.measured]
    late = None
    if measured and due_times:
        late = float(np.percentile([r.sent_at - r.started_at for r in measured], 99))
        if late > _LATE_START_SECONDS:
            limits.append(
                f"1 % of requests went out more than {late * 1e3:.0f} ms after they were due"
            )
    if refused := sum(record.error == "client_limit" for record in records):
        limits.append(
            f"the client's machine had no socket or file for {refused} requests; see ulimit -n"
        )
    return ClientHealth(len(workers), cpu, lag, worst, late, tuple(limits))


def raise_file_limit() -> None:
    """As many open files as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)
