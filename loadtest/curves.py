"""Charts of a load test: curves over the load, histograms, heat maps, ratios with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from loadtest.charts import Frame, scale
from loadtest.statistics import Interval

_BARS = 32
_COLUMNS, _ROWS = 40, 16
# The far end of a long tail would leave no room for the rest; it is counted in the last bar.
_SHOWN_PERCENT = 99.5


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; ``intervals`` are drawn as whiskers where both ends are known."""

    name: str
    values: Sequence[float | None]
    intervals: Sequence[Interval] = ()


def over_categories(
    labels: Sequence[str],
    curves: Sequence[Curve],
    x_unit: str,
    y_unit: str,
    mark: int | None = None,
) -> str:
    """Curves over named places; ``mark`` is the place of a vertical line."""
    known = [value for curve in curves for value in curve.values if value is not None]
    highs = [high for curve in curves for _, high in curve.intervals if high is not None]
    if not known:
        return ""
    # A whisker without end would flatten all curves.
    top = max(*known, min(max(highs, default=0.0), 1.5 * max(known)))
    frame = Frame.of_categories(labels, scale(0.0, top))
    parts = [frame.open("curves"), frame.axes(x_unit, y_unit)]
    ceiling, floor = frame.y(frame.y_ticks[-1]), frame.y(0.0)
    if mark is not None:
        x = frame.x(mark + 0.5)
        parts.append(
            f'<line class="knee" x1="{x:.1f}" y1="{ceiling:.1f}" x2="{x:.1f}" y2="{floor:.1f}"/>'
        )
    for number, curve in enumerate(curves):
        points = [(n + 0.5, value) for n, value in enumerate(curve.values) if value is not None]
        for place, (low, high) in enumerate(curve.intervals):
            if low is not None and high is not None:
                x, y1, y2 = frame.x(place + 0.5), frame.y(low), max(frame.y(high), ceiling)
                parts.append(
                    f'<line class="whisker s{number}" x1="{x:.1f}" y1="{y1:.1f}" x2="{x:.1f}" y2="{y2:.1f}"/>'
                )
        parts.append(f'<polyline class="line s{number}" points="{frame.path(points)}"/>')
        parts += [
            f'<circle class="dot s{number}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"/>'
            for x, y in points
        ]
    return "".join(parts) + "</svg>"


def trade_off(
    points: Sequence[tuple[str, float, float]], x_unit: str, y_unit: str, mark: int | None = None
) -> str:
    """A line through (label, x, y) in their order, each point with its label."""
    if not points:
        return ""
    x_ticks = scale(0.0, max(x for _, x, _ in points))
    frame = Frame(x_ticks, x_ticks[-1], scale(0.0, max(y for *_, y in points)))
    parts = [frame.open("trade-off"), frame.axes(x_unit, y_unit)]
    parts.append(
        f'<polyline class="line s0" points="{frame.path([(x, y) for _, x, y in points])}"/>'
    )
    for number, (label, x, y) in enumerate(points):
        big = number == mark
        at, up = frame.x(x), frame.y(y)
        parts.append(
            f'<circle class="dot s{1 if big else 0}" cx="{at:.1f}" cy="{up:.1f}" r="{6 if big else 4}"/>'
        )
        parts.append(
            f'<text class="tick" x="{at + 7:.1f}" y="{max(up - 7, 12):.1f}">{escape(label)}</text>'
        )
    return "".join(parts) + "</svg>"


def histogram(values: Sequence[float], marks: Mapping[int, float], x_unit: str) -> str:
    """How often values fall in each of equal stretches; ``marks`` are percentiles, drawn as lines."""
    if not len(values):
        return ""
    array = np.asarray(values, dtype=float)
    low, high = float(array.min()), float(np.percentile(array, _SHOWN_PERCENT))
    start = low if low > high / 3 else 0.0
    x_ticks = scale(start, high)
    counts, edges = np.histogram(np.minimum(array, x_ticks[-1]), _BARS, (x_ticks[0], x_ticks[-1]))
    shares = counts / len(array)
    frame = Frame(x_ticks, x_ticks[-1], scale(0.0, float(shares.max())))
    parts = [frame.open("histogram"), frame.axes(x_unit, "share of values", percent=True)]
    floor = frame.y(0.0)
    for share, left, right in zip(shares, edges, edges[1:], strict=False):
        if share:
            x, y = frame.x(float(left)), frame.y(float(share))
            width = max(frame.x(float(right)) - x - 1, 0.5)
            parts.append(
                f'<rect class="stream" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{floor - y:.1f}"/>'
            )
    for number, (percent, value) in enumerate(marks.items()):
        if value <= x_ticks[-1]:
            x, top = frame.x(value), frame.y(frame.y_ticks[-1])
            parts.append(
                f'<line class="knee" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{floor:.1f}"/>'
            )
            # One below the other, as they may be close together.
            low = top + 10 + 13 * number
            parts.append(f'<text class="tick" x="{x + 3:.1f}" y="{low:.1f}">p{percent}</text>')
    return "".join(parts) + "</svg>"


def heat_map(points: Sequence[tuple[float, float]], end: float, x_unit: str, y_unit: str) -> str:
    """How many of the (moment, value) fall in each field; darker is more."""
    if not points or end <= 0:
        return ""
    moments, values = np.array(points).T
    y_ticks = scale(0.0, float(np.percentile(values, _SHOWN_PERCENT)))
    frame = Frame.over_time(end, y_ticks)
    counts, xs, ys = np.histogram2d(
        moments, np.minimum(values, y_ticks[-1]), (_COLUMNS, _ROWS), ((0, end), (0, y_ticks[-1]))
    )
    most = counts.max() or 1
    parts = [frame.open("heat"), frame.axes(x_unit, y_unit)]
    for column, row in zip(*np.nonzero(counts), strict=True):
        x, right = frame.x(float(xs[column])), frame.x(float(xs[column + 1]))
        y, bottom = frame.y(float(ys[row + 1])), frame.y(float(ys[row]))
        strength = 0.18 + 0.82 * float(counts[column, row] / most) ** 0.5
        parts.append(
            f'<rect class="stream" opacity="{strength:.2f}" x="{x:.1f}" y="{y:.1f}" '
            f'width="{right - x - 0.5:.1f}" height="{bottom - y - 0.5:.1f}"/>'
        )
    return "".join(parts) + "</svg>"


def ratios(rows: Sequence[tuple[str, float, float, float, str]]) -> str:
    """(label, ratio, low, high, class) each as a dot with its interval beside a line at 1; boxes, as the bars."""
    if not rows:
        return ""
    low = min(0.8, *(row[2] for row in rows))
    high = max(1.25, *(min(row[3], 4.0) for row in rows))

    def percent(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low)

    drawn = "".join(
        f'<div class="bar-label">{escape(label)}</div><div class="bar-track ratio {kind}">'
        f'<i style="left:{percent(1.0):.2f}%"></i>'
        f'<b style="left:{percent(least):.2f}%;width:max({percent(most) - percent(least):.2f}%, 2px)"></b>'
        f'<u style="left:{percent(ratio):.2f}%"></u></div><div class="bar-value">{ratio:.2f}</div>'
        for label, ratio, least, most, kind in rows
    )
    return f'<div class="bars">{drawn}</div>'


def over_time(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], y_unit: str) -> str:
    """Named lines of (second, value)."""
    points = [point for _, line in curves for point in line]
    if not points:
        return ""
    end = max(x for x, _ in points) or 1.0
    frame = Frame.over_time(end, scale(0.0, max(y for _, y in points)))
    parts = [frame.open("curves"), frame.axes("seconds", y_unit)]
    parts += [
        f'<polyline class="line s{number}" points="{frame.path(line)}"/>'
        for number, (_, line) in enumerate(curves)
        if line
    ]
    return "".join(parts) + "</svg>"
