"""What NVML and the kernel tell becomes series; what they do not tell has none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.hardware.telemetry import Telemetry, read_gpus, read_host
from serving.metrics import Metrics
from tests.processes import wait_for

NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
GIB = 2**30


class Cards:
    """NVIDIA's library as on a rig with a card of each in ``names``; its answers are there to be changed."""

    def __init__(self) -> None:
        self.names = ["NVIDIA GeForce RTX 4090", "NVIDIA GeForce GTX 1080"]
        self.watts, self.temperature, self.reasons = 312.5, 84, 0
        self.asked_by: set[str] = set()
        self.answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlSystemGetDriverVersion": lambda: "570.86.10",
            "nvmlDeviceGetCount": self._count,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda card: self.names[card],
            "nvmlDeviceGetUUID": lambda card: f"GPU-{card}",
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=97, memory=61),
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=20 * GIB, total=24 * GIB),
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: self.reasons,
            "nvmlDeviceGetClockInfo": lambda _, kind: {
                pynvml.NVML_CLOCK_SM: 2520,
                pynvml.NVML_CLOCK_MEM: 10501,
            }[kind],
            "nvmlDeviceGetPowerUsage": lambda _: self.watts * 1e3,
            "nvmlDeviceGetEnforcedPowerLimit": lambda _: 450_000,
            "nvmlDeviceGetTotalEnergyConsumption": self._newest_only(lambda: 1_234_500),
            "nvmlDeviceGetTemperature": lambda *_: self.temperature,
            "nvmlDeviceGetTemperatureThreshold": lambda *_: 90,
            "nvmlDeviceGetFanSpeed": self._newest_only(lambda: 66),
            "nvmlDeviceGetPcieReplayCounter": lambda _: 3,
            "nvmlDeviceGetComputeRunningProcesses": lambda _: [object(), object()],
        }

    def _count(self) -> int:
        self.asked_by.add(threading.current_thread().name)
        return len(self.names)

    def _newest_only(self, answer: Callable[[], float]) -> Callable[[int], float]:
        def ask(card: int) -> float:
            if card != 0:
                raise NOT_SUPPORTED
            return answer()

        return ask


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    cards = Cards()
    for name, answer in cards.answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    return cards


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Telemetry]:
    with closing(Telemetry({"data": tmp_path}, interval_seconds=0.02)) as telemetry:
        yield telemetry


def series(telemetry: Telemetry) -> dict[tuple[str, ...], float]:
    metrics = Metrics()
    metrics.watch_machine(telemetry)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def test_a_card_in_series(cards: Cards, telemetry: Telemetry) -> None:
    told = series(telemetry)
    expected = {
        ("utilization_ratio", "0"): 0.97,
        ("memory_utilization_ratio", "0"): 0.61,
        ("memory_used_bytes", "0"): 20 * GIB,
        ("memory_total_bytes", "0"): 24 * GIB,
        ("power_watts", "0"): 312.5,
        ("power_limit_watts", "0"): 450,
        ("energy_joules_total", "0"): 1234.5,
        ("temperature_celsius", "0"): 84,
        ("slowdown_celsius", "0"): 90,
        ("clock_hertz", "0", "sm"): 2.52e9,
        ("clock_hertz", "0", "memory"): 10.501e9,
        ("throttled", "0", "thermal"): 0,
        ("throttled", "0", "power_cap"): 0,
        ("throttled", "0", "hardware_thermal"): 0,
        ("throttled", "0", "hardware_power_brake"): 0,
        ("fan_ratio", "0"): 0.66,
        ("pcie_replays_total", "0"): 3,
        ("processes", "0"): 2,
        ("info", "0", "570.86.10", "GPU-0", "NVIDIA GeForce RTX 4090"): 1,
    }
    first = {key: value for key, value in told.items() if "_gpu_" in key[0] and "0" in key}
    assert {
        ("rigserve_gpu_" + name, *rest): value for (name, *rest), value in expected.items()
    } == (pytest.approx(first))


def test_what_a_card_cannot_tell_is_absent_and_nothing_else(
    cards: Cards, telemetry: Telemetry
) -> None:
    told = series(telemetry)
    for name in ("energy_joules_total", "fan_ratio"):
        assert (f"rigserve_gpu_{name}", "0") in told
        assert (f"rigserve_gpu_{name}", "1") not in told
    assert told["rigserve_gpu_power_watts", "1"] == 312.5


def test_why_the_clocks_are_down(cards: Cards) -> None:
    cards.reasons = (
        pynvml.nvmlClocksThrottleReasonHwThermalSlowdown | pynvml.nvmlClocksThrottleReasonGpuIdle
    )
    assert read_gpus()["0"].throttled == {
        "power_cap": 0,
        "thermal": 0,
        "hardware_thermal": 1,
        "hardware_power_brake": 0,
    }


def test_it_is_read_again_and_again_and_not_by_who_asks_for_metrics(
    cards: Cards, telemetry: Telemetry
) -> None:
    cards.watts = 55.0
    wait_for(lambda: series(telemetry)["rigserve_gpu_power_watts", "0"] == 55, "a new reading")
    cards.asked_by.clear()
    wait_for(lambda: cards.asked_by, "one more")
    series(telemetry)
    assert cards.asked_by == {"telemetry"}


def test_a_card_that_is_lost_is_absent_until_it_is_back(
    cards: Cards, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(card: int) -> str:
        if card == 0:
            raise LOST
        return cards.names[card]

    with monkeypatch.context() as patch:
        patch.setattr(pynvml, "nvmlDeviceGetName", lost)
        wait_for(lambda: set(telemetry.gpus) == {"1"}, "the other alone")
    wait_for(lambda: set(telemetry.gpus) == {"0", "1"}, "both")
    with monkeypatch.context() as patch:

        def gone() -> int:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)

        patch.setattr(pynvml, "nvmlDeviceGetCount", gone)
        wait_for(lambda: not telemetry.gpus, "none, as the driver does not answer")
    wait_for(lambda: telemetry.gpus, "they are back")


def test_without_a_driver_there_is_no_series_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    with closing(Telemetry({"data": tmp_path})) as telemetry:
        told = series(telemetry)
    assert not [name for name, *_ in told if name.startswith("rigserve_gpu")]
    assert told["rigserve_host_memory_total_bytes",] > told[
        "rigserve_host_memory_available_bytes",
    ] > 0  # fmt: skip


def test_the_host(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  200 0 100 5000 7 0 3 0 0 0\ncpu0 1 2 3\n")
    (tmp_path / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 250 kB\n")
    reading = read_host({"data": tmp_path / "still" / "to be made"}, proc=tmp_path)
    ticks = os.sysconf("SC_CLK_TCK")
    assert reading.cpu_seconds["user"] == 200 / ticks
    assert reading.cpu_seconds["iowait"] == 7 / ticks
    assert (reading.memory_total_bytes, reading.memory_available_bytes) == (1_024_000, 256_000)
    disk = os.statvfs(tmp_path)
    assert reading.disk_total_bytes == {"data": disk.f_blocks * disk.f_frsize}
    assert 0 < reading.disk_free_bytes["data"] < reading.disk_total_bytes["data"]
    nothing = read_host({}, proc=tmp_path / "none")
    assert nothing.cpu_seconds == {}
    assert nothing.memory_total_bytes is None
