"""What a search has seen, as a page of charts: no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from loadtest.charts import Frame, scale
from loadtest.curves import ratios
from loadtest.html import STYLE
from serving.tuning.bench import Work
from serving.tuning.goal import Failed, Measured
from serving.tuning.outcome import Outcome
from serving.tuning.render import words_of
from serving.tuning.search import Candidate, Trial

_KINDS = (("explore", "tried briefly"), ("halve", "measured longer"), ("default", "the default"), ("contender", "the best of the others"))  # fmt: skip
_STYLE = """
.tune .explore { fill: var(--other); } .tune .halve { fill: var(--accent); opacity: .55; }
.tune .default { fill: var(--wait); } .tune .contender { fill: var(--accent); }
.dots i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin: 0 5px 0 14px; }
.dots .explore { background: var(--other); } .dots .halve { background: var(--accent); opacity: .55; }
.dots .default { background: var(--wait); } .dots .contender { background: var(--accent); }
td.words { font-size: .86rem; }
"""


def page(outcome: Outcome, work: Work, machine: str) -> str:
    """The whole page, in HTML."""
    name = escape(outcome.default.model.name)
    worked = [each for each in outcome.trials if isinstance(each.result, Measured)]
    seconds = sum(trial.seconds for trial in outcome.trials)
    body = [
        f"<h1>{name}: tuned</h1>",
        f'<p class="soft">{escape(machine)} · {work.users} users, {work.prompt_tokens} prompt tokens, '
        f"{work.output_tokens} generated · {len(outcome.trials)} measurements, {seconds:.0f} s</p>",
        f'<p class="card verdict">{escape(outcome.reason)}</p>',
        _legend(),
        '<div class="grid">',
        _figure("In the order in which they were measured", _by_order(outcome, worked)),
        _figure("Tokens per second and the wait for the first", _by_wait(outcome, worked)),
        "</div>",
        _comparison(outcome),
        _table(outcome),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: tuned</title><style>{STYLE}{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _figure(title: str, chart: str) -> str:
    return f'<figure class="card"><h3>{escape(title)}</h3>{chart}</figure>' if chart else ""


def _legend() -> str:
    keys = "".join(f'<i class="{kind}"></i>{label}' for kind, label in _KINDS)
    return f'<p class="soft dots">{keys}</p>'


def _kind(outcome: Outcome, trial: Trial) -> str:
    if trial.candidate.is_default:
        return "default"
    contender = outcome.comparison.contender if outcome.comparison else outcome.best
    if trial.candidate == contender:
        return "contender"
    return "halve" if trial.phase == "halve" else "explore"


def _by_order(outcome: Outcome, worked: Sequence[Trial]) -> str:
    points = [
        (float(number), trial.result.tokens_per_second, trial)
        for number, trial in enumerate(outcome.trials, 1)
        if isinstance(trial.result, Measured)
    ]
    return _dots(outcome, points, "measurement", "tokens per second") if worked else ""


def _by_wait(outcome: Outcome, worked: Sequence[Trial]) -> str:
    points = [
        (trial.result.ttft_p95_seconds * 1e3, trial.result.tokens_per_second, trial)
        for trial in worked
        if isinstance(trial.result, Measured)
    ]
    return _dots(outcome, points, "TTFT p95, ms", "tokens per second")


def _dots(
    outcome: Outcome, points: Sequence[tuple[float, float, Trial]], x_unit: str, y_unit: str
) -> str:
    if not points:
        return ""
    x_ticks = scale(0.0, max(x for x, *_ in points))
    frame = Frame(x_ticks, x_ticks[-1], scale(0.0, max(y for _, y, _ in points)))
    drawn = "".join(
        f'<circle class="{_kind(outcome, trial)}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4.5">'
        f"<title>{escape(words_of(outcome.default, trial.candidate))}: {y:,.0f} tok/s</title></circle>"
        for x, y, trial in points
    )
    return f"{frame.open('tune')}{frame.axes(x_unit, y_unit)}{drawn}</svg>"


def _comparison(outcome: Outcome) -> str:
    """Ratios with their intervals, as reports show them."""
    if outcome.comparison is None:
        return ""
    rows = []
    for name, label, more in (
        ("tokens_per_second", "tokens per second", True),
        ("ttft_p95_seconds", "TTFT p95", False),
        ("tpot_p95_seconds", "TPOT p95", False),
        ("usd_per_million", "price of a token", False),
    ):
        ratio = outcome.comparison.ratio(lambda each, name=name: float(getattr(each, name)))  # type: ignore[misc]
        if ratio is not None:
            better = ratio[1] > 1 if more else ratio[2] < 1
            worse = ratio[2] < 1 if more else ratio[1] > 1
            rows.append((label, *ratio, "better" if better else "worse" if worse else ""))
    title = (
        f"The best of the others over the default, in {len(outcome.comparison.pairs)} turns, 95 %"
    )
    return _figure(title, ratios(rows))


def _table(outcome: Outcome) -> str:
    heads = ("tokens/s", "TTFT p95, ms", "TPOT p95, ms", "$/M tokens", "requests of a user")
    rows = "".join(_row(outcome.default, trial) for trial in outcome.trials)
    return (
        '<h2>All measurements</h2><div class="card scroll"><table><tr><th>settings, where not the default\'s</th>'
        + "".join(f"<th>{head}</th>" for head in heads)
        + f"</tr>{rows}</table></div>"
    )


def _row(default: Candidate, trial: Trial) -> str:
    words = escape(words_of(default, trial.candidate))
    if isinstance(trial.result, Failed):
        reason = escape(trial.result.reason)
        return f'<tr><td class="words">{words}</td><td colspan="5" class="words loss">{reason}</td></tr>'
    seen = trial.result
    cells = (
        f"{seen.tokens_per_second:,.0f}",
        f"{seen.ttft_p95_seconds * 1e3:,.0f}",
        f"{seen.tpot_p95_seconds * 1e3:,.1f}",
        f"{seen.usd_per_million:.3f}",
        str(trial.rounds),
    )
    return f'<tr><td class="words">{words}</td>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
