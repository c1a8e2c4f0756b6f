"""Meters at the wall, asked over HTTP: Shelly and Tasmota plugs, or a Prometheus server that knows of one."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from serving.config import MeterConfig

_TIMEOUT_SECONDS = 2.0
_JOULES_PER_WH = 3600.0
_JOULES_PER_WATT_MINUTE = 60.0
_LONGEST_ANSWER_BYTES = 1 << 20
# Longer pauses between readings are gaps: what was drawn meanwhile is the meter's own count, if it has one.
_GAP_SECONDS = 10.0
# Plugs are on the local network, where a proxy would be in the way.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class MeterError(Exception):
    """A meter at the wall cannot be read; the message says which, and what it said."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The draw now, and the meter's own count of energy, where it has one: in steps, but without gaps."""

    watts: float
    counted_joules: float | None = None
    step_joules: float = 0.0


class WallMeter:
    """Joules since its making, from the draw, by the trapezoidal rule: read it often.

    Plugs count energy themselves, but in steps (Tasmota's are 3,600 J) that hide a request. So what
    they count is taken only over gaps, and where it differs by more than a step.
    """

    def __init__(self, config: MeterConfig) -> None:
        """Raises :class:`MeterError` if the meter does not answer, or not as one of its kind does."""
        self._read = _reader(config)
        self._last = (time.monotonic(), self._read())
        self._total = 0.0

    def joules(self) -> float:
        """Read the meter once more, and add what was used since. Raises :class:`MeterError`."""
        (last_time, last), (now, reading) = self._last, (time.monotonic(), self._read())
        self._last = (now, reading)
        self._total += _between(last, reading, now - last_time)
        return self._total


def _between(last: Reading, reading: Reading, seconds: float) -> float:
    by_draw = seconds * (last.watts + reading.watts) / 2
    if seconds <= _GAP_SECONDS or last.counted_joules is None or reading.counted_joules is None:
        return by_draw
    counted = reading.counted_joules - last.counted_joules
    # A count that began anew (a plug's memory was erased) has not seen the gap; one of the same size, give
    # or take a step, knows no more than the draws do.
    if counted < 0 or abs(counted - by_draw) <= reading.step_joules:
        return by_draw
    return counted


def _reader(config: MeterConfig) -> Callable[[], Reading]:
    match config.kind:
        case "shelly":
            # Both generations answer this without a password.
            about = _get(config.url, "/shelly")
            is_newer = isinstance(about, dict) and about.get("gen", 1) >= 2
            read = _shelly_rpc if is_newer else _shelly_gen1
        case "tasmota":
            read = _tasmota
        case "prometheus":
            read = _prometheus
    return lambda: read(config)


def _shelly_rpc(config: MeterConfig) -> Reading:
    """``Switch.GetStatus`` of Gen2 and later: ``apower`` in W, ``aenergy.total`` in Wh."""
    status = _get(config.url, f"/rpc/Switch.GetStatus?id={config.channel}")
    watts = _number(config.url, status, "apower")
    counted_wh = _number(config.url, status, "aenergy", "total")
    return Reading(watts, counted_wh * _JOULES_PER_WH, _JOULES_PER_WH / 1000)


def _shelly_gen1(config: MeterConfig) -> Reading:
    """``/meter/N`` of Gen1: ``power`` in W, ``total`` in watt-minutes, zero again when the plug restarts."""
    status = _get(config.url, f"/meter/{config.channel}")
    counted = _number(config.url, status, "total") * _JOULES_PER_WATT_MINUTE
    return Reading(_number(config.url, status, "power"), counted, _JOULES_PER_WATT_MINUTE)


def _tasmota(config: MeterConfig) -> Reading:
    """``Status 8``: ``StatusSNS.ENERGY`` with ``Power`` in W and ``Total`` in kWh, to three places."""
    status = _get(config.url, "/cm?cmnd=Status%208")
    watts = _number(config.url, status, "StatusSNS", "ENERGY", "Power")
    counted_kwh = _number(config.url, status, "StatusSNS", "ENERGY", "Total")
    return Reading(watts, counted_kwh * 1000 * _JOULES_PER_WH, _JOULES_PER_WH)


def _prometheus(config: MeterConfig) -> Reading:
    """An instant query whose one result is the draw in W."""
    assert config.query is not None
    answer = _get(config.url, f"/api/v1/query?{urlencode({'query': config.query})}")
    data = answer.get("data") if isinstance(answer, dict) else None
    result = data.get("result") if isinstance(data, dict) else None
    # A vector of one series, or a scalar itself.
    if isinstance(result, list) and len(result) == 1 and isinstance(result[0], dict):
        result = result[0].get("value")
    if not isinstance(result, list) or len(result) != 2 or isinstance(result[0], dict):
        raise MeterError(
            f"{config.url}: the query {config.query!r} must have one result; it has {_short(result)}"
        )
    return Reading(_finite(config.url, result[1]))


def _get(url: str, path: str) -> Any:
    try:
        with _opener.open(url + path, timeout=_TIMEOUT_SECONDS) as answer:
            return json.loads(answer.read(_LONGEST_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        hint = "; meters that ask for a password are not supported" if error.code == 401 else ""
        raise MeterError(f"{url}{path} answers {error.code} {error.reason}{hint}") from error
    except urllib.error.URLError as error:
        raise MeterError(f"{url} cannot be reached: {error.reason}") from error
    except (OSError, ValueError) as error:
        raise MeterError(f"{url}{path} gives no sensible answer: {error}") from error


def _number(url: str, answer: Any, *path: str) -> float:
    value = answer
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise MeterError(
            f"{url} tells no {'.'.join(path)}: {_short(answer)}; is it a meter, of this kind?"
        )
    return _finite(url, value)


def _finite(url: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise MeterError(f"{url} tells {value!r}, which is no draw and no count of energy")
    return number


def _short(answer: Any) -> str:
    return json.dumps(answer)[:200]
