"""The sections of the HTML report that are about load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from loadtest import charts, curves
from loadtest.markdown import LATENCIES, goodput, interval, number, pair
from loadtest.measures import inter_token, tokens_over_time
from loadtest.records import RequestRecord
from loadtest.report import Report, StageReport
from loadtest.statistics import Distribution

_BINS = 60
_MOST_STAGES_ON_AXIS = 14


def summary_text(report: Report) -> str:
    """What a manager needs, in whole sentences."""
    head, summary = report.headline, report.headline.summary
    said = []
    if report.knee is not None:
        said.append(
            f"The server is at its best at <b>{escape(head.stage.label)}</b>: more load {report.beyond_knee}."
        )
    ttft, tokens = summary.ttft_seconds, summary.completion_tokens_per_second
    if ttft is not None:
        rate = (
            "" if tokens is None else f" It generates <b>{tokens:,.0f} tokens a second</b> in all."
        )
        said.append(
            f"At {escape(head.stage.label)} half of the answers begin within <b>{_time(ttft.p50)}</b>, "
            f"95 of 100 within {_time(ttft.p95)}.{rate}"
        )
    if summary.goodput is not None:
        said.append(
            f"{summary.goodput.share:.0%} of the requests kept what the scenario promises "
            f"({escape(_slo_text(report))})."
        )
    failed, requests = summary.totals.errors, summary.totals.requests
    if not requests:
        said.append(f"Nothing was measured at {escape(head.stage.label)}: it was too short for it.")
    elif not failed:
        said.append("No request failed.")
    else:
        said.append(f"{failed} of {requests} requests failed.")
    return " ".join(said)


def _slo_text(report: Report) -> str:
    limits = report.options.scenario.slo.model_dump(exclude_none=True)
    names = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "end_to_end_ms": "end to end"}
    return ", ".join(f"{names[key]} up to {value:g} ms" for key, value in limits.items())


def verdicts_section(report: Report) -> str:
    """The conditions of the gate."""
    if not report.verdicts:
        return ""
    rows = "".join(
        f'<tr><td class="{"pass" if one.passed else "loss"}">{"pass" if one.passed else "FAIL"}</td>'
        f'<td class="words">{escape(one.subject)}</td><td class="words">{escape(one.reason)}</td></tr>'
        for one in report.verdicts
    )
    return f'<h2>Conditions</h2><div class="card scroll"><table class="words">{rows}</table></div>'


def load_section(report: Report) -> str:
    """All stages: the curves, and the table."""
    # Of a load that was tried again, the last time counts.
    last = {one.stage.label: one for one in report.stages}
    stages = sorted(last.values(), key=lambda one: one.stage.load)
    figures = ""
    if len(stages) > 1:
        figures = _curves(report, stages)
    rows = "".join(_stage_row(report, one) for one in report.stages)
    return (
        f"<h2>Load, throughput and latency</h2>{figures}"
        '<div class="card scroll"><table class="stages"><thead><tr><th>load</th><th>requests/s</th>'
        "<th>output<br>tokens/s</th><th>a user</th><th>TTFT ms<br>p50 / p95</th><th>ITL ms<br>p50 / p95</th>"
        f"<th>failed</th><th>goodput</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _stage_row(report: Report, one: StageReport) -> str:
    summary = one.summary
    knee = " (knee)" if report.knee is not None and one is report.headline else ""
    doubt = (
        ' <span class="doubt" title="the client was the limit">!</span>'
        if one.client.limits
        else ""
    )
    kind = ' class="ours"' if one is report.headline and len(report.stages) > 1 else ""
    return (
        f"<tr{kind}><td>{escape(one.stage.label)}{knee}{doubt}</td><td>{summary.requests_per_second:.2f}</td>"
        f"<td>{number(summary.completion_tokens_per_second)}</td>"
        f"<td>{number(summary.completion_tokens_per_second_per_user)}</td><td>{pair(summary.ttft_seconds)}</td>"
        f"<td>{pair(summary.itl_seconds)}</td><td>{summary.totals.errors} of {summary.totals.requests}</td>"
        f"<td>{goodput(summary)}</td></tr>"
    )


def _curves(report: Report, stages: Sequence[StageReport]) -> str:
    places = [_short_label(one) for one in stages]
    if len(places) > _MOST_STAGES_ON_AXIS:
        step = -(-len(places) // _MOST_STAGES_ON_AXIS)
        places = [name if n % step == 0 else "" for n, name in enumerate(places)]
    unit = "users" if stages[0].stage.users is not None else "requests per second"
    knee = None
    if report.knee is not None:
        knee = next(n for n, one in enumerate(stages) if one.stage.load == report.knee)
    summaries = [one.summary for one in stages]
    tokens = curves.Curve(
        "tokens/s",
        [summary.completion_tokens_per_second for summary in summaries],
        [summary.completion_tokens_interval for summary in summaries],
    )
    figures = [
        _figure(
            "Throughput",
            curves.over_categories(places, [tokens], unit, "output tokens per second", knee),
            "Whiskers: 95 % intervals.",
        )
    ]
    for title, key in (
        ("Time to first token", "ttft_seconds"),
        ("Inter-token latency", "itl_seconds"),
    ):
        lines = [
            curves.Curve(
                part,
                [_ms(getattr(summary, key), part) for summary in summaries],
                [_ms_interval(getattr(summary, key), part) for summary in summaries],
            )
            for part in ("p50", "p95")
        ]
        figures.append(
            _figure(
                title,
                curves.over_categories(places, lines, unit, "milliseconds", knee),
                _key("p50", "p95"),
            )
        )
    points = [
        (place, summary.completion_tokens_per_second, summary.end_to_end_seconds.p50)
        for place, summary in zip(places, summaries, strict=True)
        if summary.completion_tokens_per_second is not None and summary.end_to_end_seconds
    ]
    figures.append(
        _figure(
            "What throughput costs in latency",
            curves.trade_off(points, "output tokens per second", "end to end p50, seconds", knee),
            f"Each point is a load in {unit}; right and low is good.",
        )
    )
    return f'<div class="grid">{"".join(figures)}</div>'


def _short_label(one: StageReport) -> str:
    return one.stage.label.split(" ")[0]


def latency_section(report: Report) -> str:
    """The distributions at the headline's load."""
    head = report.headline
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{_cells(getattr(head.summary, key))}</tr>"
        for name, key in LATENCIES
    )
    good = _good(report, head)
    tokens = [pair for record in good for pair in zip(*inter_token(record), strict=True)]
    figures = [
        _latency_figure(
            "Time to first token", [r.ttft_seconds for r in good], head.summary.ttft_seconds
        ),
        _latency_figure(
            "Inter-token latency", [value for value, _ in tokens], head.summary.itl_seconds
        ),
        _latency_figure(
            "Time per output token", [r.tpot_seconds for r in good], head.summary.tpot_seconds
        ),
        _latency_figure(
            "End to end", [r.end_to_end_seconds for r in good], head.summary.end_to_end_seconds
        ),
    ]
    return (
        f'<h2>Latency at {escape(head.stage.label)}</h2><div class="card scroll"><table class="latencies"><thead>'
        "<tr><th>milliseconds</th><th>mean</th><th>p50</th><th>p90</th><th>p95</th><th>p99</th><th>values</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
        '<p class="soft">Small: 95 % intervals; a ? is an end that so few values leave open. Latencies count from when '
        "a request was due. Tokens are those of the server's usage: a gap before a chunk of several is shared among them.</p>"
        f'<div class="grid">{"".join(figures)}</div>'
    )


def _latency_figure(name: str, values: Sequence[float | None], found: Distribution | None) -> str:
    if found is None:
        return ""
    known = [value * 1e3 for value in values if value is not None]
    marks = {50: found.p50 * 1e3, 95: found.p95 * 1e3, 99: found.p99 * 1e3}
    caption = " · ".join(f"p{percent} {value:,.1f} ms" for percent, value in marks.items())
    return _figure(name, curves.histogram(known, marks, "milliseconds"), caption)


def time_section(report: Report) -> str:
    """The whole bench over time: throughput, heat maps, every request."""
    load = [record for record in report.records if not record.warmup]
    if not load:
        return ""
    begin = min(record.started_at for record in load)
    end = max(record.ended_at for record in load)
    spans = [
        (
            record.user,
            record.started_at - begin,
            None if record.first_token_at is None else record.first_token_at - begin,
            record.ended_at - begin,
            record.error is not None,
        )
        for record in load
    ]
    heading = "Every request"
    if len(spans) > charts.MOST_REQUESTS:
        heading = f"The first {charts.MOST_REQUESTS:,} of {len(spans):,} requests"
    rate = [(at - begin, value) for at, value in tokens_over_time(load, begin, end, _BINS)]
    firsts = [
        (r.started_at - begin, r.ttft_seconds * 1e3) for r in load if r.ttft_seconds is not None
    ]
    wholes = [(r.started_at - begin, r.end_to_end_seconds) for r in load if r.error is None]
    figures = (
        _figure("Output tokens per second", charts.area(rate, "seconds", "tokens per second"), ""),
        _figure(
            heading,
            charts.timeline(spans, "seconds"),
            '<span class="key" style="background:var(--wait)"></span>waiting for the first token'
            '<span class="key" style="background:var(--accent)"></span>streaming'
            '<span class="key" style="background:var(--bad)"></span>failed',
        ),
        _figure(
            "Time to first token, by when it was asked",
            curves.heat_map(firsts, end - begin, "seconds", "milliseconds"),
            "Darker: more requests.",
        ),
        _figure(
            "End to end, by when it was asked",
            curves.heat_map(wholes, end - begin, "seconds", "seconds"),
            "Darker: more requests.",
        ),
    )
    return f'<h2>Over time</h2><div class="grid">{"".join(figures)}</div>'


def tenants_section(report: Report) -> str:
    """The tenants beside each other, at the headline's load."""
    head = report.headline
    if not head.tenants:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{one.totals.requests}</td><td>{one.totals.errors}</td>"
        f"<td>{number(one.completion_tokens_per_second)}</td><td>{pair(one.ttft_seconds)}</td>"
        f"<td>{pair(one.itl_seconds)}</td><td>{_share(one.cached_share)}</td><td>{goodput(one)}</td></tr>"
        for name, one in head.tenants.items()
    )
    figures = "".join(
        _latency_figure(
            f"{escape(name)}: time to first token",
            [r.ttft_seconds for r in _good(report, head) if r.tenant == name],
            one.ttft_seconds,
        )
        for name, one in head.tenants.items()
    )
    return (
        f'<h2>Tenants at {escape(head.stage.label)}</h2><div class="card scroll"><table class="tenants"><thead><tr><th>tenant</th>'
        "<th>requests</th><th>failed</th><th>output<br>tokens/s</th><th>TTFT ms<br>p50 / p95</th><th>ITL ms<br>p50 / p95</th>"
        f"<th>cached<br>prompt</th><th>goodput</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<div class="grid">{figures}</div>'
    )


def comparison_section(report: Report) -> str:
    """Beside the baseline."""
    comparison = report.comparison
    if comparison is None:
        return ""
    parts = []
    for label, changes in comparison.stages:
        rows = [
            (
                change.name,
                change.ratio,
                *change.interval,
                "worse" if change.worse else "better" if change.better else "same",
            )
            for change in changes
        ]
        parts.append(_figure(f"At {escape(label)}: now over then", curves.ratios(rows), ""))
    return (
        f"<h2>Beside {escape(comparison.baseline)}</h2>"
        f'<p class="soft">{escape(comparison.model)}, {escape(comparison.started[:16].replace("T", " "))}. '
        "Bars are 99 % intervals of the ratio. Red or green: the whole of it is more than 5 % off; grey: no "
        f'difference is shown.</p><div class="grid">{"".join(parts)}</div>'
    )


def client_section(report: Report) -> str:
    """Whether the client can be believed."""
    begin = min((one.stage.begin for one in report.stages), default=0.0)
    end = max((sample.at for sample in report.samples), default=begin)
    busiest: dict[int, float] = {}
    latest: dict[int, float] = {}
    for sample in report.samples:
        if sample.at >= begin:
            second = int(sample.at - begin)
            busiest[second] = max(busiest.get(second, 0.0), sample.cpu_share)
            latest[second] = max(latest.get(second, 0.0), sample.lag_mean_seconds * 1e3)
    cpu = [(second + 0.5, share * 100) for second, share in sorted(busiest.items())]
    lag = [(second + 0.5, value) for second, value in sorted(latest.items())]
    limits = [(one.stage.label, why) for one in report.stages for why in one.client.limits]
    told = "".join(
        f'<p class="warning card">At {escape(label)}: {escape(why)}.</p>' for label, why in limits
    )
    if not limits:
        told = '<p class="soft">The client was never the limit.</p>'
    if end <= begin or not cpu:
        return f"<h2>The client</h2>{told}"
    return (
        f'<h2>The client</h2>{told}<div class="grid">'
        + _figure(
            "CPU of the busiest client process", charts.area(cpu, "seconds", "% of one core"), ""
        )
        + _figure(
            "Lateness of its event loop", charts.area(lag, "seconds", "milliseconds, mean"), ""
        )
        + "</div>"
    )


def settings_section(report: Report) -> str:
    """All that is needed to repeat it."""
    text = json.dumps(report.to_repeat, indent=2)
    return f'<h2>To repeat it</h2><div class="card"><pre>{escape(text)}</pre></div>'


def _figure(title: str, drawing: str, caption: str) -> str:
    """Title and caption are HTML."""
    if not drawing:
        return ""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card"><h3>{title}</h3>{drawing}{below}</figure>'


def _key(*names: str) -> str:
    return "".join(f'<span class="key k{n}"></span>{name}' for n, name in enumerate(names))


def _good(report: Report, one: StageReport) -> list[RequestRecord]:
    return [
        record for record in report.records
        if record.measured and record.error is None and record.stage == one.stage.index
    ]  # fmt: skip


def _cells(found: Distribution | None) -> str:
    if found is None:
        return "<td>-</td>" * 6
    cells = []
    for part in ("mean", "p50", "p90", "p95", "p99"):
        shown = f"{getattr(found, part) * 1e3:,.1f}<small>{interval(found, part)}</small>"
        cells.append(f"<td>{shown}</td>")
    return f"{''.join(cells)}<td>{found.count:,}</td>"


def _ms(found: Distribution | None, part: str) -> float | None:
    return None if found is None else getattr(found, part) * 1e3


def _ms_interval(found: Distribution | None, part: str) -> tuple[float | None, float | None]:
    if found is None:
        return None, None
    low, high = (None if end is None else end * 1e3 for end in found.intervals[part])
    return low, high


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"
