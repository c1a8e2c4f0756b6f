"""Locust's web UI, and beside it a page on what Locust does not know: tokens, and the time to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from flask import Blueprint, Response
from rich.console import Console

from loadtest import charts, curves
from loadtest.crowd import Collector, Crowd
from loadtest.html import STYLE
from loadtest.measures import inter_token, tokens_over_time
from loadtest.records import RequestRecord

WEB_HOST = "127.0.0.1"
WEB_PORT = 8089
_REFRESH_SECONDS = 2
_SHOWN_SECONDS = 300.0
# Locust's page is an application of its own, in which there is room for tables, but not for charts.
_LINK = (
    '<a href="/llm" style="position:fixed;right:18px;bottom:14px;z-index:2000;background:#0f766e;color:#fff;'
    'padding:8px 14px;border-radius:8px;font:600 14px system-ui;text-decoration:none">LLM charts</a></body>'
)


@contextmanager
def serve_web(crowd: Crowd, console: Console, clock: Callable[[], float]) -> Iterator[None]:
    """Serve it until the block ends."""
    web = crowd.environment.create_web_ui(WEB_HOST, WEB_PORT)
    pages = Blueprint("llm", __name__)

    @pages.route("/llm")
    def llm() -> str:
        return render_live(crowd.collector, clock())

    def link(response: Response) -> Response:
        if response.mimetype == "text/html" and not response.direct_passthrough:
            response.set_data(response.get_data(as_text=True).replace("</body>", _LINK, 1))
        return response

    assert web.app is not None
    web.app.register_blueprint(pages)
    web.app.after_request(link)
    console.print(
        f"Locust's web UI: http://{WEB_HOST}:{WEB_PORT} (LLM charts: /llm); Ctrl-C ends and reports"
    )
    try:
        yield
    finally:
        web.stop()


def render_live(collector: Collector, now: float) -> str:
    """The page, as of now."""
    since = max(now - _SHOWN_SECONDS, 0.0)
    records = [record for record in collector.records if record.ended_at >= since]
    seconds = max(int(now - since), 1)
    tokens = [(at - since, rate) for at, rate in tokens_over_time(records, since, now, seconds)]
    good = [record for record in records if record.error is None]
    ttfts = [(r.ended_at - since, r.ttft_seconds * 1e3) for r in good if r.ttft_seconds is not None]
    gaps = [
        (r.ended_at - since, float(np.median(inter_token(r)[0])) * 1e3)
        for r in good
        if r.chunk_gaps_seconds
    ]
    figures = (
        (
            "Output tokens per second",
            charts.area(tokens, "seconds", "tokens per second") if records else "",
        ),
        ("Time to first token: p50, p95", curves.over_time(_by_second(ttfts), "milliseconds")),
        (
            "Inter-token latency of answers: p50, p95",
            curves.over_time(_by_second(gaps), "milliseconds"),
        ),
        (
            "Answers per second",
            charts.area(_counts(good, since, seconds), "seconds", "answers") if good else "",
        ),
    )
    drawn = "".join(
        f'<figure class="card"><h3>{title}</h3>{chart or "nothing yet"}</figure>'
        for title, chart in figures
    )
    failed = len(records) - len(good)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="refresh" content="{_REFRESH_SECONDS}"><title>LLM charts</title><style>{STYLE}</style></head>'
        f'<body><main><h1>The last {seconds} seconds</h1><p class="soft">{len(records)} answers, {failed} failed, '
        f'{collector.in_flight} requests in flight. <a href="/">Locust</a></p><div class="grid">{drawn}</div>'
        "</main></body></html>"
    )


def _counts(records: list[RequestRecord], since: float, seconds: int) -> list[tuple[float, float]]:
    counts = np.bincount(
        [min(int(r.ended_at - since), seconds - 1) for r in records], minlength=seconds
    )
    return [(second + 0.5, float(count)) for second, count in enumerate(counts)]


def _by_second(
    points: list[tuple[float, float]],
) -> list[tuple[str, list[tuple[float, float]]]]:
    """Median and 95th percentile of what ended in each second."""
    seconds: dict[int, list[float]] = {}
    for at, value in points:
        seconds.setdefault(int(at), []).append(value)
    return [
        (
            f"p{percent}",
            [(s + 0.5, float(np.percentile(v, percent))) for s, v in sorted(seconds.items())],
        )
        for percent in (50, 95)
    ]
