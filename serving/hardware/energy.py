"""Energy meters: what the rig draws, measured where something measures it and estimated where nothing does.

NVML sees the NVIDIA cards and nothing else; RAPL sees the processor packages and nothing else. Neither sees
fans, disks or the power supply's losses: only a meter at the wall does.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import pynvml

from serving.config import PowerConfig

_log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 0.2
_HISTORY_SECONDS = 900.0
_POWERCAP = Path("/sys/class/powercap")

_NOT_SUPPORTED = pynvml.nvmlExceptionClass(pynvml.NVML_ERROR_NOT_SUPPORTED)

ESTIMATED = "estimated"

# Joules since some moment; only differences mean anything.
Counter = Callable[[], float]


class EnergyMeter:
    """Samples a counter in the background and answers for any window of the last 15 minutes.

    ``source`` names who measures: ``nvml``, ``rapl``, or ``estimated`` when there is no counter, or none
    that still works. Opening takes one sampling interval; close it to end its thread.
    """

    def __init__(self, source: str, counter: Counter | None, fallback_watts: float) -> None:
        self.source = source if counter else ESTIMATED
        self._fallback_watts = fallback_watts
        kept = int(_HISTORY_SECONDS / _SAMPLE_SECONDS)
        self._samples: deque[tuple[float, float]] = deque(maxlen=kept)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if counter:
            # Two samples make a power: from the start, what is called measured is.
            self._sample(counter)
            time.sleep(_SAMPLE_SECONDS)
            self._sample(counter)
            self._thread = threading.Thread(
                target=self._run, args=(counter,), name="energy", daemon=True
            )
            self._thread.start()

    def mean_watts(self, started_monotonic: float, ended_monotonic: float) -> float:
        """Mean draw between two moments of ``time.monotonic()``; the configured watts if not measured.

        Where no sample reaches, as in the last fifth of a second, the nearest ones speak for it.
        """
        if self.source == ESTIMATED:
            return self._fallback_watts
        with self._lock:
            samples = list(self._samples)
        return mean_watts_of(samples, started_monotonic, ended_monotonic)

    def _sample(self, counter: Counter) -> None:
        if self.source == ESTIMATED:
            return
        try:
            sample = (time.monotonic(), counter())
            if self._samples and sample[1] < self._samples[-1][1]:
                raise ValueError("its counter went backwards")
        except (OSError, ValueError, pynvml.NVMLError) as error:
            _log.warning(
                "the %s energy meter failed (%s); energy is estimated from now on",
                *(self.source, error),
            )
            self.source = ESTIMATED
            self._closing.set()
        else:
            with self._lock:
                self._samples.append(sample)

    def _run(self, counter: Counter) -> None:
        while not self._closing.wait(_SAMPLE_SECONDS):
            self._sample(counter)

    def close(self) -> None:
        """End the sampling."""
        self._closing.set()
        if self._thread:
            self._thread.join()


def mean_watts_of(
    samples: Sequence[tuple[float, float]], started_seconds: float, ended_seconds: float
) -> float:
    """Mean power in a window, from two or more samples (seconds, joules so far) in order of time.

    The power is taken as constant between two samples. A window is cut to what the samples cover.
    """

    def clamp(moment: float) -> float:
        return min(max(moment, samples[0][0]), samples[-1][0])

    def interval_at(moment: float) -> int:
        return min(bisect_right(samples, moment, key=itemgetter(0)) - 1, len(samples) - 2)

    def watts(interval: int) -> float:
        (from_time, from_joules), (to_time, to_joules) = samples[interval : interval + 2]
        return (to_joules - from_joules) / (to_time - from_time)

    started, ended = clamp(started_seconds), clamp(ended_seconds)
    first, last = interval_at(started), interval_at(ended)
    if first == last:
        return watts(first)
    joules = (
        watts(first) * (samples[first + 1][0] - started)
        + (samples[last][1] - samples[first + 1][1])
        + watts(last) * (ended - samples[last][0])
    )
    return joules / (ended - started)


def open_meter(power: PowerConfig, powercap: Path = _POWERCAP) -> EnergyMeter:
    """The best meter this machine has: NVML, else RAPL, else the configured ``load_watts``."""
    if counter := _nvml_counter():
        return EnergyMeter("nvml", counter, power.load_watts)
    if counter := _rapl_counter(powercap):
        return EnergyMeter("rapl", counter, power.load_watts)
    return EnergyMeter(ESTIMATED, None, power.load_watts)


def _nvml_counter() -> Counter | None:
    """Joules of all NVIDIA cards together; None unless every one of them can be measured."""
    try:
        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        cards = [_card_counter(handle) for handle in handles]
    except pynvml.NVMLError:
        return None
    return (lambda: sum(card() for card in cards)) if cards else None


def _card_counter(card: object) -> Counter:
    """A card's own energy counter; its power draw summed up on those that lack one (before Volta)."""

    def joules() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3

    try:
        joules()
    except _NOT_SUPPORTED:
        return PowerIntegral(lambda: float(pynvml.nvmlDeviceGetPowerUsage(card)) / 1e3).joules
    return joules


class PowerIntegral:
    """Joules since its making, from a power reading, by the trapezoidal rule: read it often."""

    def __init__(self, watts: Callable[[], float]) -> None:
        self._watts = watts
        self._last = (time.monotonic(), watts())
        self._total = 0.0

    def joules(self) -> float:
        """Read the power once more and add what was used since."""
        (last_time, last_watts), (now, watts) = self._last, (time.monotonic(), self._watts())
        self._total += (now - last_time) * (last_watts + watts) / 2
        self._last = (now, watts)
        return self._total


def _rapl_counter(powercap: Path) -> Counter | None:
    """Joules of all processor packages together; None unless every one of them can be read."""
    try:
        # Beside packages there are parts of them, and psys, which counts them again.
        packages = [
            RaplDomain(folder)
            for folder in sorted(powercap.glob("intel-rapl:*"))
            if (folder / "name").read_text().startswith("package")
        ]
    except (OSError, ValueError) as error:
        _log.warning(
            "this machine has energy counters that cannot be read (%s); energy is estimated. "
            "Let this user read energy_uj below %s to have it measured",
            *(error, powercap),
        )
        return None
    return (lambda: sum(package.joules() for package in packages)) if packages else None


class RaplDomain:
    """One counter that wraps to zero at its range; must be read more often than it wraps (minutes)."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._read()
        self._total = 0

    def _read(self) -> int:
        return int(self._file.read_text())

    def joules(self) -> float:
        """What was used since its making."""
        now = self._read()
        # The counter's last value before the wrap is its range, the next is 0.
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6
