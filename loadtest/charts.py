"""Charts as inline SVG: each function returns one ``<svg>``, coloured by the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of :func:`log_bars`; ``ours`` bars stand out."""

    label: str
    value: float
    text: str
    ours: bool = False


def log_bars(bars: Sequence[Bar]) -> str:
    """Horizontal bars on a logarithmic scale, each with its label above it and its value beside it."""
    drawn = [bar for bar in bars if bar.value > 0]
    if not drawn:
        return ""
    low = math.floor(math.log10(min(bar.value for bar in drawn)))
    high = math.ceil(math.log10(max(bar.value for bar in drawn)))
    high = max(high, low + 1)
    row, label_space, value_space = 24, 330, 76
    width = 900
    plot = width - label_space - value_space
    height = row * len(drawn) + 44

    def x(value: float) -> float:
        return label_space + plot * (math.log10(value) - low) / (high - low)

    parts = [_open(width, height, "bars")]
    for exponent in range(low, high + 1):
        at = x(10.0**exponent)
        parts.append(_line(at, 4, at, height - 38, "grid"))
        parts.append(_text(at, height - 22, f"${10.0**exponent:g}", "tick", "middle"))
    for number, bar in enumerate(drawn):
        top = 6 + number * row
        kind = "bar ours" if bar.ours else "bar"
        parts.append(_text(label_space - 10, top + 13, bar.label, "label", "end"))
        parts.append(
            f'<rect class="{kind}" x="{label_space}" y="{top}" height="{row - 8}" '
            f'width="{max(x(bar.value) - label_space, 2):.1f}" rx="3"/>'
        )
        parts.append(
            _text(max(x(bar.value), label_space + 2) + 8, top + 13, bar.text, "value", "start")
        )
    parts.append(
        _text(
            label_space + plot / 2,
            height - 4,
            "USD per million tokens, logarithmic",
            "axis",
            "middle",
        )
    )
    return "".join(parts) + "</svg>"


def cumulative(values: Sequence[float], marks: Mapping[int, float], x_unit: str) -> str:
    """The share of values at or below each value; ``marks`` puts dots at percentiles."""
    ordered = sorted(values)
    if not ordered:
        return ""
    frame = _Frame(0.0, _nice_ceiling(ordered[-1]), 0.0, 1.0)
    points = [(0.0, 0.0)]
    for position, value in enumerate(ordered):
        points.append((value, position / len(ordered)))
        points.append((value, (position + 1) / len(ordered)))
    # Thousands of steps look the same as some hundreds.
    step = max(len(points) // 800, 1)
    points = [*points[::step], points[-1]]
    dots = "".join(
        f'<circle class="mark" cx="{frame.x(value):.1f}" cy="{frame.y(percent / 100):.1f}" r="4"/>'
        for percent, value in marks.items()
    )
    return (
        frame.open("cumulative")
        + frame.axes(x_unit, "share of values", percent=True)
        + f'<polyline class="curve" points="{frame.path(points)}"/>{dots}</svg>'
    )


def area(points: Sequence[tuple[float, float]], x_unit: str, y_unit: str) -> str:
    """A filled line over time."""
    if not points:
        return ""
    top = _nice_ceiling(max(y for _, y in points))
    frame = _Frame(0.0, points[-1][0] + points[0][0], 0.0, top)
    outline = [(points[0][0], 0.0), *points, (points[-1][0], 0.0)]
    return (
        frame.open("area")
        + frame.axes(x_unit, y_unit)
        + f'<polygon class="fill" points="{frame.path(outline)}"/>'
        + f'<polyline class="curve" points="{frame.path(points)}"/></svg>'
    )


def timeline(requests: Sequence[tuple[int, float, float | None, float, bool]], x_unit: str) -> str:
    """Requests as lines, one row a user: (row, start, first token, end, failed)."""
    if not requests:
        return ""
    rows = max(row for row, *_ in requests) + 1
    end = max(stop for *_, stop, _ in requests)
    frame = _Frame(0.0, end, 0.0, float(rows))
    thick = max(min((_HEIGHT - _TOP - _BOTTOM) / rows - 2, 12.0), 1.0)
    parts = [frame.open("timeline"), frame.axes(x_unit, "users", y_ticks=False)]
    for row, start, first, stop, failed in requests:
        middle = frame.y(rows - row - 0.5)
        split = stop if first is None else first
        spans = ((start, split, "error" if failed else "wait"), (split, stop, "stream"))
        for begin, finish, kind in spans:
            width = frame.x(finish) - frame.x(begin) - 0.6
            if width > 0:
                parts.append(
                    f'<rect class="{kind}" x="{frame.x(begin):.1f}" y="{middle - thick / 2:.1f}" '
                    f'width="{width:.1f}" height="{thick:.1f}"/>'
                )
    return "".join(parts) + "</svg>"


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plotting area, and the way from values to places in it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / ((self.y_high - self.y_low) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def open(self, kind: str) -> str:
        return _open(_WIDTH, _HEIGHT, kind)

    def axes(self, x_unit: str, y_unit: str, *, percent: bool = False, y_ticks: bool = True) -> str:
        parts = []
        for number in range(5):
            value = self.x_low + (self.x_high - self.x_low) * number / 4
            parts.append(
                _text(self.x(value), _HEIGHT - _BOTTOM + 15, _short(value), "tick", "middle")
            )
            value = self.y_low + (self.y_high - self.y_low) * number / 4
            at = self.y(value)
            parts.append(_line(_LEFT, at, _WIDTH - _RIGHT, at, "grid"))
            if y_ticks:
                shown = f"{value:.0%}" if percent else _short(value)
                parts.append(_text(_LEFT - 6, at + 4, shown, "tick", "end"))
        parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, x_unit, "axis", "middle"))
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        parts.append(
            f'<text class="axis" text-anchor="middle" '
            f'transform="translate(12 {middle:.0f}) rotate(-90)">{escape(y_unit)}</text>'
        )
        return "".join(parts)


def _open(width: int, height: int, kind: str) -> str:
    return f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img">'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _nice_ceiling(value: float) -> float:
    """The next of 1, 2, 4, 5, 8, 10 times a power of ten: its quarters are round."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if value <= step * power)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
