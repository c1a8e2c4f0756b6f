"""Charts as inline SVG (the bars as boxes), coloured by the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# So narrow that the text is still readable when a telephone shows it at two thirds of this.
_WIDTH, _HEIGHT = 460, 215
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 10, 42
_TICKS = 4  # about so many steps on each axis
MOST_REQUESTS = 1500


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of :func:`log_bars`; ``ours`` bars stand out."""

    label: str
    value: float
    text: str
    ours: bool = False


def log_bars(bars: Sequence[Bar], unit: str) -> str:
    """Horizontal bars on a logarithmic scale, each with its label and its value; ``unit`` names the scale.

    Boxes rather than SVG, so that text keeps its size and labels move above their bars on a narrow screen.
    """
    drawn = [bar for bar in bars if bar.value > 0]
    if not drawn:
        return ""
    low = math.floor(math.log10(min(bar.value for bar in drawn)))
    high = max(math.ceil(math.log10(max(bar.value for bar in drawn))), low + 1)

    def percent(value: float) -> float:
        return 100 * (math.log10(value) - low) / (high - low)

    decades = range(low, high + 1)
    lines = "".join(f'<i style="left:{percent(10.0**decade):.2f}%"></i>' for decade in decades)
    rows = "".join(
        f'<div class="bar-label">{escape(bar.label)}</div>'
        f'<div class="bar-track{" ours" if bar.ours else ""}">{lines}'
        f'<b style="width:max({percent(bar.value):.2f}%, 2px)"></b></div>'
        f'<div class="bar-value">{escape(bar.text)}</div>'
        for bar in drawn
    )
    ticks = "".join(
        f'<span style="left:{percent(10.0**decade):.2f}%">{10.0**decade:g}</span>'
        for decade in decades
    )
    return (
        f'<div class="bars">{rows}<div class="bar-label"></div><div class="bar-ticks">{ticks}</div>'
        f'<div class="bar-value"></div><div class="bar-unit">{escape(unit)}, logarithmic scale</div></div>'
    )


def area(points: Sequence[tuple[float, float]], x_unit: str, y_unit: str) -> str:
    """A filled line over time."""
    if not points:
        return ""
    top = max(y for _, y in points)
    frame = Frame.over_time(points[-1][0] + points[0][0], scale(0.0, top))
    outline = [(points[0][0], 0.0), *points, (points[-1][0], 0.0)]
    return (
        frame.open("area")
        + frame.axes(x_unit, y_unit)
        + f'<polygon class="fill" points="{frame.path(outline)}"/>'
        + f'<polyline class="curve" points="{frame.path(points)}"/></svg>'
    )


def log_curve(
    points: Sequence[tuple[float, float]],
    levels: Sequence[tuple[str, float]],
    x_unit: str,
    y_unit: str,
) -> str:
    """A line where both axes are logarithmic, and level lines across, each with the class of its style."""
    xs = [x for x, _ in points]
    ys = [y for y in (*(y for _, y in points), *(level for _, level in levels)) if y > 0]
    if not xs or not ys:
        return ""
    x_low, x_high = math.log10(min(xs)), math.log10(max(xs))
    y_low = math.floor(math.log10(min(ys)))
    y_high = max(math.ceil(math.log10(max(ys))), y_low + 1)
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def at_x(value: float) -> float:
        return _LEFT + (math.log10(value) - x_low) / (x_high - x_low) * (right - _LEFT)

    def at_y(value: float) -> float:
        return bottom - (math.log10(value) - y_low) / (y_high - y_low) * (bottom - _TOP)

    parts = [_open(_WIDTH, _HEIGHT, "log-curve")]
    for decade in range(y_low, y_high + 1):
        at = at_y(10.0**decade)
        parts.append(_line(_LEFT, at, right, at, "rule"))
        parts.append(_text(_LEFT - 6, at + 4, f"{10.0**decade:g}", "tick", "end"))
    parts += [
        _text(at_x(10.0**decade), bottom + 16, f"{10.0**decade:g}", "tick", "middle")
        for decade in range(math.ceil(x_low - 1e-9), math.floor(x_high + 1e-9) + 1)
    ]
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, x_unit, "axis", "middle"))
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(13 '
        f'{(_TOP + bottom) / 2:.0f}) rotate(-90)">{escape(y_unit)}</text>'
    )
    parts += [
        _line(_LEFT, at_y(level), right, at_y(level), kind) for kind, level in levels if level > 0
    ]
    path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points if y > 0)
    return "".join(parts) + f'<polyline class="curve" points="{path}"/></svg>'


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_unit: str, y_unit: str
) -> str:
    """Lines over time, from zero on; each is named below, in its colour (the page's ``series-0`` and on)."""
    points = [point for _, line in series for point in line]
    if not points:
        return ""
    frame = Frame.over_time(max(x for x, _ in points), scale(0.0, max(y for _, y in points)))
    drawn = "".join(
        f'<polyline class="curve series-{number}" points="{frame.path(line)}"/>'
        for number, (_, line) in enumerate(series)
    )
    names = "".join(
        f'<span class="series-{number}">{escape(name)}</span>'
        for number, (name, _) in enumerate(series)
    )
    chart = frame.open("lines") + frame.axes(x_unit, y_unit) + drawn + "</svg>"
    return f'{chart}<div class="names">{names}</div>'


def timeline(requests: Sequence[tuple[int, float, float | None, float, bool]], x_unit: str) -> str:
    """Requests as lines, one row a user: (row, start, first token, end, failed).

    Of very many, the :data:`MOST_REQUESTS` that began first: more would be a solid block.
    """
    if not requests:
        return ""
    rows = max(row for row, *_ in requests) + 1
    requests = sorted(requests, key=lambda request: request[1])[:MOST_REQUESTS]
    end = max(stop for *_, stop, _ in requests)
    frame = Frame.over_time(end, (0.0, float(rows)))
    thick = max(min((_HEIGHT - _TOP - _BOTTOM) / rows - 2, 12.0), 1.0)
    parts = [
        frame.open("timeline"),
        frame.axes(x_unit, f"{rows} user{'s' if rows != 1 else ''}", y_lines=False),
    ]
    for row, start, first, stop, failed in requests:
        middle = frame.y(rows - row - 0.5)
        split = stop if first is None else first
        spans = ((start, split, "error" if failed else "wait"), (split, stop, "stream"))
        for begin, finish, kind in spans:
            # A sliver of space sets neighbours apart, where there is room for one.
            width = max(frame.x(finish) - frame.x(begin) - 0.6, 0.4)
            if finish > begin:
                parts.append(
                    f'<rect class="{kind}" x="{frame.x(begin):.1f}" y="{middle - thick / 2:.1f}" '
                    f'width="{width:.1f}" height="{thick:.1f}"/>'
                )
    return "".join(parts) + "</svg>"


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area, from the first ticks to ``x_end`` and the last of ``y_ticks``.

    ``x_labels`` stand at the ticks instead of their numbers.
    """

    x_ticks: Sequence[float]
    x_end: float
    y_ticks: Sequence[float]
    x_labels: Sequence[str] | None = None

    @staticmethod
    def over_time(end: float, y_ticks: Sequence[float]) -> Frame:
        """With an x axis that ends where the bench did."""
        return Frame([tick for tick in scale(0.0, end) if tick <= end], end, y_ticks)

    @staticmethod
    def of_categories(labels: Sequence[str], y_ticks: Sequence[float]) -> Frame:
        """With an x axis of names, the first of them at 0.5, each 1 from the next."""
        places = [0.0, *(number + 0.5 for number in range(len(labels)))]
        return Frame(places, float(len(labels)), y_ticks, ["", *labels])

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / ((self.x_end - self.x_ticks[0]) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def open(self, kind: str) -> str:
        return _open(_WIDTH, _HEIGHT, kind)

    def axes(self, x_unit: str, y_unit: str, *, percent: bool = False, y_lines: bool = True) -> str:
        bottom = _HEIGHT - _BOTTOM
        labels = self.x_labels or [_short(tick) for tick in self.x_ticks]
        parts = [
            _text(self.x(tick), bottom + 16, label, "tick", "middle")
            for tick, label in zip(self.x_ticks, labels, strict=True)
        ]
        for tick in self.y_ticks if y_lines else ():
            at = self.y(tick)
            parts.append(_line(_LEFT, at, _WIDTH - _RIGHT, at, "rule"))
            shown = f"{tick:.0%}" if percent else _short(tick)
            parts.append(_text(_LEFT - 6, at + 4, shown, "tick", "end"))
        parts.append(_line(_LEFT, bottom, _WIDTH - _RIGHT, bottom, "rule"))
        parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, x_unit, "axis", "middle"))
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        parts.append(
            f'<text class="axis" text-anchor="middle" '
            f'transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y_unit)}</text>'
        )
        return "".join(parts)


def _open(width: int, height: int, kind: str) -> str:
    return f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img">'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def scale(low: float, high: float) -> list[float]:
    """Evenly spaced round numbers, of which the first is at most ``low`` and the last at least ``high``."""
    # Below a millionth of a millisecond there is nothing to see, and soon nothing a float can divide.
    rough = max((high - low) / _TICKS or abs(high) or 1.0, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if rough <= nice * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
