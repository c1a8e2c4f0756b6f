"""Energy comes from a meter that is really there, or is called an estimate."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import PowerConfig
from serving.hardware.energy import (
    EnergyMeter,
    PowerIntegral,
    RaplDomain,
    mean_watts_of,
    open_meter,
)
from tests.processes import wait_for

POWER = PowerConfig(idle_watts=10, load_watts=123)


def powercap(folder: Path, microjoules: int, wrap_at: int = 10**9) -> Path:
    # The core is part of the package, psys all of it and more: counting them would count twice.
    for folder_name, name, value in (
        ("intel-rapl:0", "package-0", microjoules),
        ("intel-rapl:0:0", "core", microjoules * 7),
        ("intel-rapl:1", "psys", microjoules * 9),
    ):
        domain = folder / folder_name
        domain.mkdir(exist_ok=True)
        (domain / "name").write_text(f"{name}\n")
        # Replaced, not rewritten: the sampler must never see an empty file, as the kernel shows none.
        (domain / "new").write_text(f"{value}\n")
        (domain / "new").replace(domain / "energy_uj")
        (domain / "max_energy_range_uj").write_text(f"{wrap_at}\n")
    return folder


# Samples at rising times, each with the joules used so far.
SAMPLES = st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 5000)), min_size=1, max_size=20).map(
    lambda steps: [
        (
            100 + sum(seconds for seconds, _ in steps[:n]),
            sum(joules for _, joules in steps[:n]),
        )
        for n in range(len(steps) + 1)
    ]
)


@pytest.fixture(autouse=True)
def no_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine with an NVIDIA card its meter would come first.
    monkeypatch.setattr("serving.hardware.energy._nvml_counter", lambda: None)


def test_without_a_meter_the_configured_watts_are_an_estimate(tmp_path: Path) -> None:
    meter = open_meter(POWER, powercap=tmp_path)
    draw = meter.draw(0, 10)
    assert (draw.source, draw.watts, draw.idle_watts) == ("estimated", 123, 10)
    meter.close()


def test_rapl_counts_packages_and_survives_the_counters_wrap(tmp_path: Path) -> None:
    meter = open_meter(POWER, powercap=powercap(tmp_path, 900, wrap_at=1000))
    assert meter.source == "rapl"
    samples = meter._samples
    before = samples[-1][1]
    powercap(tmp_path, 99, wrap_at=1000)  # 900 -> 1000 -> 99: 200 microjoules
    wait_for(lambda: samples[-1][1] > before, "a new sample")
    assert samples[-1][1] - before == pytest.approx(200e-6)
    assert meter.draw(time.monotonic() - 1, time.monotonic()).watts > 0
    meter.close()


def test_mean_watts_is_energy_over_time() -> None:
    begun = time.monotonic()
    meter = EnergyMeter("rapl", lambda: (time.monotonic() - begun) * 50, POWER)
    wait_for(lambda: len(meter._samples) >= 4, "some samples")
    assert meter.draw(begun, time.monotonic()).watts == pytest.approx(50, rel=0.2)
    # A request shorter than the sampling interval gets the draw around it.
    assert meter.draw(begun + 0.25, begun + 0.26).watts == pytest.approx(50, rel=0.2)
    meter.close()


def test_the_ends_of_a_window_are_interpolated() -> None:
    samples = [(0.0, 0.0), (1.0, 10.0), (2.0, 110.0), (3.0, 110.0)]  # 10 W, 100 W, 0 W
    assert mean_watts_of(samples, 0.5, 1.5) == pytest.approx((5 + 50) / 1)
    assert mean_watts_of(samples, 0.5, 2.5) == pytest.approx((5 + 100) / 2)
    assert mean_watts_of(samples, 1.2, 1.3) == pytest.approx(100)
    # What the samples do not cover is not guessed.
    assert mean_watts_of(samples, -10, 0.5) == pytest.approx(10)
    assert mean_watts_of(samples, 1.5, 10) == pytest.approx(50 / 1.5)
    assert mean_watts_of(samples, 7, 8) == pytest.approx(0)
    assert mean_watts_of(samples, 2, 2) == pytest.approx(0)


@given(SAMPLES, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_windows_side_by_side_add_up(
    samples: list[tuple[float, float]], a: float, b: float, c: float
) -> None:
    begin, end = samples[0][0], samples[-1][0]
    one, two, three = (begin + share * (end - begin) for share in sorted((a, b, c)))
    whole = mean_watts_of(samples, one, three) * (three - one)
    left = mean_watts_of(samples, one, two) * (two - one)
    right = mean_watts_of(samples, two, three) * (three - two)
    assert left + right == pytest.approx(whole, rel=1e-6, abs=1e-6)
    assert mean_watts_of(samples, begin, end) * (end - begin) == pytest.approx(samples[-1][1])


@given(SAMPLES, st.floats(90, 320), st.floats(90, 320))
def test_a_mean_lies_between_the_least_and_the_most(
    samples: list[tuple[float, float]], a: float, b: float
) -> None:
    powers = [(j2 - j1) / (t2 - t1) for (t1, j1), (t2, j2) in itertools.pairwise(samples)]
    mean = mean_watts_of(samples, min(a, b), max(a, b))
    assert min(powers) - 1e-6 <= mean * (1 + 1e-6)
    assert mean <= max(powers) * (1 + 1e-6) + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**12), st.lists(st.floats(0, 1), max_size=15))
def test_a_wrapping_counter_adds_up(
    tmp_path_factory: pytest.TempPathFactory, wrap_at: int, shares: list[float]
) -> None:
    folder = powercap(tmp_path_factory.mktemp("rapl"), 0, wrap_at) / "intel-rapl:0"
    domain = RaplDomain(folder)
    used = 0
    for share in shares:
        used += int(share * wrap_at)  # less than once around between two readings
        (folder / "energy_uj").write_text(str(used % (wrap_at + 1)))
        assert domain.joules() == pytest.approx(used / 1e6)


def test_power_is_summed_up_where_a_card_counts_no_energy() -> None:
    watts = iter([100.0, 100.0, 300.0])
    started = time.monotonic()
    integral = PowerIntegral(lambda: next(watts))
    time.sleep(0.1)
    before_reading = time.monotonic()
    constant = integral.joules()
    assert 100 * 0.1 <= constant <= 100 * (time.monotonic() - started)
    time.sleep(0.1)
    # From 100 W to 300 W is 200 W on the way.
    rising = integral.joules() - constant
    assert 200 * 0.1 <= rising <= 200 * (time.monotonic() - before_reading)


def test_what_was_before_a_counter_began_anew_is_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    readings = iter([500.0, 600.0, 1.0, 2.0, 3.0])
    meter = EnergyMeter("shelly", lambda: next(readings, 3.0), POWER)
    wait_for(lambda: len(meter._samples) >= 3 and meter._samples[0][1] == 1.0, "the new count")
    assert "went backwards" in caplog.text
    # Nothing is made of the difference between the two counts.
    assert 0 <= meter.draw(time.monotonic() - 0.5, time.monotonic()).watts < 20
    meter.close()


def test_what_is_measured_is_so_from_the_start() -> None:
    begun = time.monotonic()
    meter = EnergyMeter("rapl", lambda: (time.monotonic() - begun) * 50, POWER)
    now = time.monotonic()
    assert meter.draw(now, now).watts == pytest.approx(50, rel=0.2)
    meter.close()


def test_counters_that_cannot_be_read_are_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    powercap(tmp_path, 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    meter = open_meter(POWER, powercap=tmp_path)
    assert meter.draw(0, 1).source == "estimated"
    assert "energy_uj" in caplog.text
    meter.close()


def test_a_meter_that_fails_is_an_estimate_until_it_works_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.hardware.energy._REACH_SECONDS", 0.0)
    monkeypatch.setattr("serving.hardware.energy._REACH_INTERVALS", 2)
    works, begun = [True], time.monotonic()

    def counter() -> float:
        if works[0]:
            return (time.monotonic() - begun) * 50
        raise OSError("gone")

    meter = EnergyMeter("rapl", counter, POWER, interval_seconds=0.05)

    def source() -> str:
        now = time.monotonic()
        return meter.draw(now - 0.05, now).source

    assert source() == "rapl"
    works[0] = False
    wait_for(lambda: source() == "estimated", "the failure is noticed")
    now = time.monotonic()
    assert meter.draw(now, now).watts == 123
    works[0] = True
    wait_for(lambda: source() == "rapl", "it works again")
    assert caplog.text.count("gone") == 1  # said once, not twenty times a second
    meter.close()


def test_idle_draw_is_the_least_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.hardware.energy._IDLE_SECONDS", 0.2)
    begun = time.monotonic()

    def counter() -> float:
        # 40 W for half a second, then 200 W.
        seconds = time.monotonic() - begun
        return 40 * min(seconds, 0.5) + 200 * max(seconds - 0.5, 0.0)

    meter = EnergyMeter("rapl", counter, POWER, interval_seconds=0.05)
    wait_for(lambda: time.monotonic() - begun > 1.0, "a second")
    draw = meter.draw(time.monotonic() - 0.2, time.monotonic())
    meter.close()
    assert draw.watts == pytest.approx(200, rel=0.2)
    assert draw.idle_watts == pytest.approx(40, rel=0.2)
