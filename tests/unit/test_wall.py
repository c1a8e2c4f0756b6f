"""Plugs at the wall: a real HTTP server that speaks as they do, by their makers' documents."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from serving.config import MeterConfig, PowerConfig
from serving.hardware.energy import open_meter
from serving.hardware.wall import MeterError, Reading, WallMeter, _between
from tests.processes import wait_for

# Path, with its query, to what is answered.
Answers = dict[str, Any]


@contextmanager
def device(answers: Answers | Callable[[str], Any]) -> Iterator[str]:
    """A plug on a free port; gives its URL. What it does not know is a 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers(self.path) if callable(answers) else answers.get(self.path)
            status = 404 if answer is None else answer if isinstance(answer, int) else 200
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# Gen2+: https://shelly-api-docs.shelly.cloud/gen2/ComponentsAndServices/Switch#status
SHELLY_RPC: Answers = {
    "/shelly": {"name": None, "id": "shellyplusplugs-fcb4670bd324", "model": "SNPL-00112EU", "gen": 2, "auth_en": False},
    "/rpc/Switch.GetStatus?id=0": {
        "id": 0, "source": "timer", "output": True, "apower": 8.9, "voltage": 237.5, "current": 0.041,
        "aenergy": {"total": 6.532, "by_minute": [45.199, 47.141, 88.397], "minute_ts": 1626935779},
        "temperature": {"tC": 23.5, "tF": 74.4},
    },
}  # fmt: skip
# Gen1: https://shelly-api-docs.shelly.cloud/gen1/#shelly-plug-plugs-meter-0
SHELLY_GEN1: Answers = {
    "/shelly": {"type": "SHPLG-S", "mac": "5ECF7F1632E8", "auth": False, "fw": "20161223"},
    "/meter/0": {
        "power": 8.9, "overpower": 0, "is_valid": True, "timestamp": 1569598307,
        "counters": [8.812, 9.017, 8.963], "total": 392,
    },
}  # fmt: skip
# https://tasmota.github.io/docs/Commands/#management (Status 8)
TASMOTA: Answers = {
    "/cm?cmnd=Status%208": {
        "StatusSNS": {
            "Time": "2022-01-11T21:57:38",
            "ENERGY": {
                "TotalStartTime": "2020-10-21T22:15:00", "Total": 3.705, "Yesterday": 0.028, "Today": 0.026,
                "Power": 8.9, "ApparentPower": 12, "ReactivePower": 7, "Factor": 0.74, "Voltage": 233, "Current": 0.051,
            },
        }
    }
}  # fmt: skip


def prometheus(path: str) -> Any:
    """https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries"""
    query = parse_qs(urlsplit(path).query)["query"][0]
    results: dict[str, list[Any]] = {
        'sum(plug_power_watts{plug="rig"})': [{"metric": {}, "value": [1435781451.781, "8.9"]}],
        "plug_power_watts": [
            {"metric": {"plug": "rig"}, "value": [1435781451.781, "8.9"]},
            {"metric": {"plug": "lamp"}, "value": [1435781451.781, "3"]},
        ],
    }
    return {"status": "success", "data": {"resultType": "vector", "result": results.get(query, [])}}


@pytest.mark.parametrize(
    ("kind", "answers", "query"),
    [
        ("shelly", SHELLY_RPC, None),
        ("shelly", SHELLY_GEN1, None),
        ("tasmota", TASMOTA, None),
        ("prometheus", prometheus, 'sum(plug_power_watts{plug="rig"})'),
    ],
)
def test_each_kind_is_measured_at_the_wall(kind: Any, answers: Any, query: str | None) -> None:
    with device(answers) as url:
        config = MeterConfig(kind=kind, url=url, query=query, interval_seconds=0.2)
        power = PowerConfig(idle_watts=1, load_watts=123, meter=config)
        with closing(open_meter(power)) as meter:
            now = time.monotonic()
            draw = meter.draw(now - 0.1, now)
            assert draw.watts == pytest.approx(8.9, rel=0.05)
            assert draw.source == kind


def test_the_counts_of_all_makers_are_joules() -> None:
    for answers, kind, joules in (
        (SHELLY_RPC, "shelly", 6.532 * 3600),
        (SHELLY_GEN1, "shelly", 392 * 60),
        (TASMOTA, "tasmota", 3.705 * 3.6e6),
    ):
        with device(answers) as url:
            meter = WallMeter(MeterConfig.model_validate({"kind": kind, "url": url}))
            reading = meter._read()
            assert reading.watts == 8.9
            assert reading.counted_joules == pytest.approx(joules)


def test_a_gap_is_what_the_meter_counted_meanwhile() -> None:
    before = Reading(100.0, 5_000.0)
    assert _between(before, Reading(300.0, 5_060.0), 0.5) == pytest.approx(100)  # not the 60 J step
    assert _between(before, Reading(100.0, 65_000.0), 400) == pytest.approx(60_000)
    # A count that began anew, and a meter that has none: the draws before and after are all there is.
    assert _between(before, Reading(300.0, 10.0), 400) == pytest.approx(80_000)
    assert _between(Reading(100.0, None), Reading(300.0, None), 400) == pytest.approx(80_000)


def test_a_count_in_coarse_steps_makes_no_gap_of_seconds_free() -> None:
    """Twelve seconds at 100 W are 1,200 J, a third of Tasmota's step: as often as not it has not moved."""
    before = Reading(100.0, 36_000.0, 3_600.0)
    for counted in (36_000.0, 39_600.0):
        assert _between(before, Reading(100.0, counted, 3_600.0), 12) == pytest.approx(1_200)
    # An hour in which the rig was off.
    assert _between(before, Reading(100.0, 43_200.0, 3_600.0), 3_600) == pytest.approx(7_200)


def test_a_plug_that_leaves_the_network_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serving.hardware.energy._REACH_SECONDS", 0.5)
    monkeypatch.setattr("serving.hardware.energy._REACH_INTERVALS", 1)
    is_there = [True]
    with device(lambda path: TASMOTA.get(path) if is_there[0] else 500) as url:
        config = MeterConfig(kind="tasmota", url=url, interval_seconds=0.2)
        with closing(open_meter(PowerConfig(meter=config))) as meter:

            def source() -> str:
                now = time.monotonic()
                return meter.draw(now, now).source

            assert source() == "tasmota"
            is_there[0] = False
            wait_for(lambda: source() == "estimated", "an estimate")
            is_there[0] = True
            wait_for(lambda: source() == "tasmota", "the plug")
    assert caplog.text.count("answers 500") == 1
    assert "works again" in caplog.text


@pytest.mark.parametrize(
    ("kind", "answers", "query", "message"),
    [
        ("shelly", {"/shelly": {"gen": 2}, "/rpc/Switch.GetStatus?id=0": {"id": 0, "output": True}}, None, "tells no apower"),
        ("shelly", {"/shelly": 401}, None, "password"),
        ("tasmota", {"/cm?cmnd=Status%208": {"StatusSNS": {"Time": "x"}}}, None, "tells no StatusSNS.ENERGY.Power"),
        ("tasmota", {"/cm?cmnd=Status%208": b"<html>"}, None, "no sensible answer"),
        ("tasmota", {"/cm?cmnd=Status%208": {"StatusSNS": {"ENERGY": {"Power": "nan", "Total": 1}}}}, None, "no draw"),
        ("prometheus", prometheus, "plug_power_watts", "must have one result"),
        ("prometheus", prometheus, "nothing", "must have one result"),
    ],
)  # fmt: skip
def test_what_is_no_meter_is_said_so(
    kind: Any, answers: Any, query: str | None, message: str
) -> None:
    with device(answers) as url, pytest.raises(MeterError, match=message):
        WallMeter(MeterConfig(kind=kind, url=url, query=query))


def test_a_meter_that_is_not_there_is_said_so() -> None:
    with device({}) as url:
        pass
    with pytest.raises(MeterError, match="cannot be reached"):
        WallMeter(MeterConfig(kind="tasmota", url=url))
