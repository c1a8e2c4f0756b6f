"""Draws the dashboards for the docs: `python -m tests.monitoring.pictures [--seconds 240]`. Needs chromium.

Grafana itself does not run here: the panels' own queries, asked of a real Prometheus on a rig under load, are
drawn with the plotting code of the load test's report. The cards are those of the tests.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from loadtest import charts
from tests.monitoring.live import LoadedRig, Prometheus, as_asked, scraped_cards
from tools.dashboards import BOARDS, Board, Panel, Query

_DOCS = Path(__file__).parents[2] / "docs" / "dashboards"
_WIDTH = 1400
_COLOURS = ("#0f766e", "#d97706", "#4f46e5", "#c2413b", "#65a30d", "#0891b2", "#a21caf", "#64748b")
_STYLE = """body { margin: 0; background: #f6f7f9; color: #1b2330; font: 15px/1.5 system-ui, sans-serif; }
main { padding: 20px; } h1 { font-size: 1.5rem; margin: 0; } .soft { color: #5b6678; margin: 2px 0 14px; }
.board { display: grid; grid-template-columns: repeat(24, 1fr); gap: 12px; }
.card { background: #fff; border: 1px solid #dfe3ea; border-radius: 10px; padding: 10px 14px; margin: 0; overflow: hidden; }
h3 { font-size: .95rem; margin: 0 0 4px; } .number { font-size: 1.7rem; font-weight: 650; }
.chart { width: 100%; height: auto; display: block; } .chart text { fill: #5b6678; font: 12px system-ui, sans-serif; }
.chart .rule { stroke: #dfe3ea; } .chart .curve { fill: none; stroke-width: 2; }
.names { display: flex; flex-wrap: wrap; gap: 0 14px; font-size: .8rem; }
.row { display: grid; grid-template-columns: 1fr max-content; font-size: .88rem; gap: 12px; }
.row b { grid-column: 1 / -1; height: 8px; border-radius: 3px; background: #0f766e; margin-bottom: 6px; }
""" + "".join(
    f".chart .series-{number} {{ stroke: {colour}; }} .names .series-{number} {{ color: {colour}; }}\n"
    for number, colour in enumerate(_COLOURS)
)
_NOT_REAL = " The figures of this picture are made up by a test: no card was there."
_SHOWN: Mapping[str, Callable[[float], str]] = {
    "percentunit": lambda value: f"{value:.1%}",
    "currencyUSD": lambda value: f"${value:.3g}",
    "s": lambda value: f"{value:.3g} s",
    "kwatth": lambda value: f"{value:.3g} kWh",
}
# What axes show instead of numbers that are too long for them.
_SCALES = {"bytes": 1e9, "hertz": 1e9}
_UNITS = {
    "percentunit": "share",
    "currencyUSD": "USD",
    "s": "seconds",
    "reqps": "per second",
    "joule": "joules",
    "bytes": "GB",
    "watt": "watts",
    "celsius": "°C",
    "hertz": "GHz",
    "short": "",
}


def main() -> int:
    """Write the pictures; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="of load (default: 240)")
    seconds: float = parser.parse_args().seconds
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("error: there is no chromium", file=sys.stderr)
        return 1
    _DOCS.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        scraped_cards() as cards,
        LoadedRig(Path(folder), Path(folder) / "cache") as rig,
    ):
        rig.wait_until_ready()
        targets = [rig.target, cards]
        with Prometheus(Path(folder), targets, rig.keys["prometheus"]) as prometheus:
            prometheus.wait_until_ready()
            began = time.time()
            # It comes, goes, and comes again.
            for _ in range(2):
                rig.put_under_load(seconds / 4)
                time.sleep(seconds / 4)
            for board in BOARDS:
                page = Path(folder) / f"{board.name}.html"
                page.write_text(_page(board, prometheus, began, time.time()))
                _photograph(browser, page, _DOCS / f"{board.name}.png", _height(board))
                print(f"wrote {_DOCS / board.name}.png")
    return 0


def _photograph(browser: str, page: Path, picture: Path, height: int) -> None:
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={_WIDTH},{height}", f"--screenshot={picture}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )


def _height(board: Board) -> int:
    """Enough for all rows of panels."""
    columns = sum(panel.width for panel in board.panels if panel.kind != "number")
    return (
        130 + 100 * any(panel.kind == "number" for panel in board.panels) + 330 * -(-columns // 24)
    )


def _page(board: Board, prometheus: Prometheus, began: float, ended: float) -> str:
    cards = "".join(
        f'<figure class="card" style="grid-column: span {panel.width}"><h3>{escape(panel.title)}</h3>'
        f"{_drawn(panel, prometheus, began, ended)}</figure>"
        for panel in board.panels
    )
    return (
        f"<!doctype html><meta charset=utf-8><style>{_STYLE}</style><main><h1>{escape(board.title)}</h1>"
        f'<p class="soft">{escape(board.text)}{_NOT_REAL if board.name == "gpu" else ""}</p><div class="board">{cards}</div></main>'
    )


def _drawn(panel: Panel, prometheus: Prometheus, began: float, ended: float) -> str:
    show = _SHOWN.get(panel.unit, _plain)
    if panel.kind == "lines":
        scale = _SCALES.get(panel.unit, 1.0)
        step = max((ended - began) / 120, 1.0)
        series = [
            (
                _name(query, labels),
                [(at - began, value / scale) for at, value in points if value == value],
            )
            for query in panel.queries
            for labels, points in prometheus.query_range(
                as_asked(query.expression), began, ended, step
            )
        ]
        drawn = [(name, points) for name, points in series if points][: len(_COLOURS)]
        return charts.lines(drawn, "seconds", _UNITS[panel.unit]) or "<p class=soft>no data</p>"
    values = [
        (_name(query, dict(labels)), value)
        for query in panel.queries
        for labels, value in prometheus.query(as_asked(query.expression)).items()
        if math.isfinite(value)
    ]
    if panel.kind == "number":
        return f'<div class="number">{show(values[0][1]) if values else "no data"}</div>'
    most = max((abs(value) for _, value in values), default=1.0) or 1.0
    return "".join(
        f'<div class="row"><span>{escape(name)}</span><span>{show(value)}</span>'
        f'<b style="width: {max(100 * value / most, 0.5):.1f}%"></b></div>'
        for name, value in values
    )


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _name(query: Query, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), query.legend)


if __name__ == "__main__":
    sys.exit(main())
