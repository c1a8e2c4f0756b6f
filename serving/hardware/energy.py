"""Energy meters: what the rig draws, measured where something measures it and estimated where nothing does.

NVML sees the NVIDIA cards and nothing else; RAPL sees the processor packages and nothing else. Neither sees
fans, disks or the power supply's losses: only a meter at the wall does.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pynvml

from serving.config import PowerConfig

_log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 0.2
_HISTORY_SECONDS = 900.0
_POWERCAP = Path("/sys/class/powercap")

ESTIMATED = "estimated"

# Joules since some moment; only differences mean anything.
Counter = Callable[[], float]


class EnergyMeter:
    """Samples a counter in the background and answers for any recent window of time.

    ``source`` names who measures: ``nvml``, ``rapl``, or ``estimated`` when there is no counter, or none
    that still works. Close it to end its thread.
    """

    def __init__(self, source: str, counter: Counter | None, fallback_watts: float) -> None:
        self.source = source if counter else ESTIMATED
        self._counter = counter
        self._fallback_watts = fallback_watts
        kept = int(_HISTORY_SECONDS / _SAMPLE_SECONDS)
        self._samples: deque[tuple[float, float]] = deque(maxlen=kept)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if counter:
            self._sample(counter)
            self._thread = threading.Thread(target=self._run, args=(counter,), daemon=True)
            self._thread.start()

    def mean_watts(self, started_monotonic: float, ended_monotonic: float) -> float:
        """Mean draw between two moments of ``time.monotonic()``; the configured watts if not measured."""
        if self.source == ESTIMATED:
            return self._fallback_watts
        samples = list(self._samples)
        if len(samples) < 2:
            return self._fallback_watts
        # A window shorter than the sampling interval gets the draw of the interval it falls into.
        first = max(bisect.bisect_right(samples, (started_monotonic, float("inf"))) - 1, 0)
        last = min(bisect.bisect_left(samples, (ended_monotonic, 0.0)), len(samples) - 1)
        if last <= first:
            first = last - 1 if last else 0
            last = first + 1
        (from_time, from_joules), (to_time, to_joules) = samples[first], samples[last]
        return (to_joules - from_joules) / (to_time - from_time)

    def _sample(self, counter: Counter) -> None:
        try:
            self._samples.append((time.monotonic(), counter()))
        except (OSError, ValueError, pynvml.NVMLError) as error:
            _log.warning(
                "the %s energy meter failed (%s); energy is estimated from now on",
                *(self.source, error),
            )
            self.source = ESTIMATED
            self._closing.set()

    def _run(self, counter: Counter) -> None:
        while not self._closing.wait(_SAMPLE_SECONDS):
            self._sample(counter)

    def close(self) -> None:
        """End the sampling."""
        self._closing.set()
        if self._thread:
            self._thread.join()


def open_meter(power: PowerConfig, powercap: Path = _POWERCAP) -> EnergyMeter:
    """The best meter this machine has: NVML, else RAPL, else the configured ``load_watts``."""
    for source, counter in (("nvml", _nvml_counter()), ("rapl", _rapl_counter(powercap))):
        if counter:
            return EnergyMeter(source, counter, power.load_watts)
    return EnergyMeter(ESTIMATED, None, power.load_watts)


def _nvml_counter() -> Counter | None:
    """Joules of all NVIDIA cards together, from the counters that cards since Volta have."""
    try:
        pynvml.nvmlInit()
        cards = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]

        def joules() -> float:
            millijoules = sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, cards))
            return float(millijoules) / 1e3

        joules()
    except pynvml.NVMLError:
        return None
    return joules if cards else None


def _rapl_counter(powercap: Path) -> Counter | None:
    """Joules of all processor packages together, from the kernel's powercap counters."""
    domains = []
    # intel-rapl:0 is a package (AMD's too); intel-rapl:0:1 a part of it.
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") == 1:
            with contextlib.suppress(OSError, ValueError):
                domains.append(_RaplDomain(folder))
    if not domains:
        return None
    return lambda: sum(domain.joules() for domain in domains)


class _RaplDomain:
    """One counter that wraps to zero at its range; must be read more often than it wraps (minutes)."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._total = 0

    def _read(self) -> int:
        return int(self._file.read_text())

    def joules(self) -> float:
        now = self._read()
        # The counter's last value before the wrap is its range, the next is 0.
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6
