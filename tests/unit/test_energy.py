"""Energy comes from a meter that is really there, or is called an estimate."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from serving.config import PowerConfig
from serving.hardware.energy import EnergyMeter, open_meter
from tests.processes import wait_for

POWER = PowerConfig(idle_watts=10, load_watts=123)


def powercap(folder: Path, microjoules: int, wrap_at: int = 10**9) -> Path:
    domain = folder / "intel-rapl:0"
    domain.mkdir(exist_ok=True)
    (domain / "energy_uj").write_text(str(microjoules))
    (domain / "max_energy_range_uj").write_text(str(wrap_at))
    part = folder / "intel-rapl:0:0"  # part of the package: counting it would count twice
    part.mkdir(exist_ok=True)
    (part / "energy_uj").write_text(str(microjoules * 7))
    (part / "max_energy_range_uj").write_text(str(wrap_at))
    return folder


@pytest.fixture(autouse=True)
def no_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine with an NVIDIA card its meter would come first.
    monkeypatch.setattr("serving.hardware.energy._nvml_counter", lambda: None)


def test_without_a_meter_the_configured_watts_are_an_estimate(tmp_path: Path) -> None:
    meter = open_meter(POWER, powercap=tmp_path)
    assert meter.source == "estimated"
    assert meter.mean_watts(0, 10) == 123
    meter.close()


def test_rapl_counts_packages_and_survives_the_counters_wrap(tmp_path: Path) -> None:
    meter = open_meter(POWER, powercap=powercap(tmp_path, 900, wrap_at=1000))
    assert meter.source == "rapl"
    started = time.monotonic()
    samples = meter._samples
    before = samples[-1][1]
    powercap(tmp_path, 99, wrap_at=1000)  # 900 -> 1000 -> 99: 200 microjoules
    wait_for(lambda: samples[-1][1] > before, "a new sample")
    assert samples[-1][1] - before == pytest.approx(200e-6)
    assert meter.mean_watts(started - 10, time.monotonic() + 10) > 0
    meter.close()


def test_mean_watts_is_energy_over_time() -> None:
    begun = time.monotonic()
    meter = EnergyMeter("rapl", lambda: (time.monotonic() - begun) * 50, fallback_watts=1)
    wait_for(lambda: len(meter._samples) >= 4, "some samples")
    assert meter.mean_watts(begun, time.monotonic()) == pytest.approx(50, rel=0.05)
    # A request shorter than the sampling interval gets the draw around it.
    assert meter.mean_watts(begun + 0.25, begun + 0.26) == pytest.approx(50, rel=0.05)
    meter.close()


def test_a_meter_that_fails_becomes_an_estimate() -> None:
    readings = iter([0.0, 1.0])

    def counter() -> float:
        for value in readings:
            return value
        raise OSError("gone")

    meter = EnergyMeter("rapl", counter, fallback_watts=77)
    wait_for(lambda: meter.source == "estimated", "the failure is noticed")
    assert meter.mean_watts(0, time.monotonic()) == 77
    meter.close()
