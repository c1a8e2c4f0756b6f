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
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import pynvml

from serving.config import PowerConfig
from serving.hardware.wall import MeterError, WallMeter

_log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 0.2
_HISTORY_SECONDS = 900.0
# A window is measured if samples reach within so many sampling intervals of its ends, and at least so many seconds.
_REACH_INTERVALS = 5
_REACH_SECONDS = 2.0
# What the rig draws without work is the least mean over so long.
_IDLE_SECONDS = 5.0
_POWERCAP = Path("/sys/class/powercap")

_NOT_SUPPORTED = pynvml.nvmlExceptionClass(pynvml.NVML_ERROR_NOT_SUPPORTED)

ESTIMATED = "estimated"

# Joules since some moment; only differences mean anything.
Counter = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Draw:
    """The rig's mean draw in a window of time, and what of it is drawn without work, too."""

    watts: float
    idle_watts: float
    source: str


class EnergyMeter:
    """Samples a counter in the background and answers for any window of the last 15 minutes.

    A window that samples do not reach (the meter failed, a plug was off the network) has the configured
    watts, as ``estimated``; the meter is tried again all the time. Opening takes one sampling interval;
    close it to end its thread.
    """

    def __init__(
        self,
        source: str,
        counter: Counter | None,
        power: PowerConfig,
        interval_seconds: float = _SAMPLE_SECONDS,
    ) -> None:
        self.source = source if counter else ESTIMATED
        self._power = power
        self._interval_seconds = interval_seconds
        self._reach_seconds = max(_REACH_INTERVALS * interval_seconds, _REACH_SECONDS)
        kept = int(_HISTORY_SECONDS / interval_seconds)
        self._samples: deque[tuple[float, float]] = deque(maxlen=kept)
        self._least_watts = float("inf")
        self._is_failing = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if counter:
            # Two samples make a power: from the start, what is called measured is.
            self._sample(counter)
            time.sleep(interval_seconds)
            self._sample(counter)
            self._thread = threading.Thread(
                target=self._run, args=(counter,), name="energy", daemon=True
            )
            self._thread.start()

    def draw(self, started_monotonic: float, ended_monotonic: float) -> Draw:
        """The draw between two moments of ``time.monotonic()``; of the configured watts if it was not measured.

        Where no sample reaches, as in the last fifth of a second, the nearest ones speak for it.
        """
        with self._lock:
            samples, least_watts = list(self._samples), self._least_watts
        if not self._covers(samples, started_monotonic, ended_monotonic):
            return Draw(self._power.load_watts, self._power.idle_watts, ESTIMATED)
        watts = mean_watts_of(samples, started_monotonic, ended_monotonic)
        idle_watts = self._power.idle_watts if least_watts == float("inf") else least_watts
        return Draw(watts, min(idle_watts, watts), self.source)

    def _covers(self, samples: Sequence[tuple[float, float]], begin: float, end: float) -> bool:
        if len(samples) < 2:
            return False
        # Of what lies beyond the history, the rest speaks.
        is_full = len(samples) == self._samples.maxlen
        begins_in_time = is_full or samples[0][0] <= begin + self._reach_seconds
        return begins_in_time and samples[-1][0] >= end - self._reach_seconds

    def _sample(self, counter: Counter) -> None:
        try:
            now, joules = time.monotonic(), counter()
        except (MeterError, OSError, ValueError, pynvml.NVMLError) as error:
            if not self._is_failing:
                _log.warning(
                    "the %s energy meter fails (%s); energy is estimated until it works again",
                    *(self.source, error),
                )
            self._is_failing = True
            return
        if self._is_failing:
            self._is_failing = False
            _log.warning("the %s energy meter works again", self.source)
        with self._lock:
            if self._samples and joules < self._samples[-1][1]:
                _log.warning(
                    "the counter of the %s energy meter went backwards: what was before is forgotten",
                    self.source,
                )
                self._samples.clear()
            self._samples.append((now, joules))
            self._see_idle(now, joules)

    def _see_idle(self, now: float, joules: float) -> None:
        back = round(_IDLE_SECONDS / self._interval_seconds)
        if len(self._samples) > back:
            begin, then_joules = self._samples[-1 - back]
            self._least_watts = min(self._least_watts, (joules - then_joules) / (now - begin))

    def _run(self, counter: Counter) -> None:
        while not self._closing.wait(self._interval_seconds):
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
    """The configured meter at the wall, else the best that this machine has: NVML, RAPL, or ``load_watts``.

    Raises :class:`MeterError` if the one at the wall does not answer now.
    """
    if power.meter is not None:
        wall = WallMeter(power.meter)
        return EnergyMeter(power.meter.kind, wall.joules, power, power.meter.interval_seconds)
    if counter := _nvml_counter():
        return EnergyMeter("nvml", counter, power)
    if counter := _rapl_counter(powercap):
        return EnergyMeter("rapl", counter, power)
    return EnergyMeter(ESTIMATED, None, power)


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
