"""A usage report for a terminal, a spreadsheet, or a browser."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from html import escape

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from serving.cost.money import Currency, saving_text
from serving.cost.usage_report import BudgetUse, UsageReport, UsageRow

_KWH = 3.6e6
_CSV_COLUMNS = (
    "requests", "errors", "prompt_tokens", "cached_tokens", "completion_tokens", "busy_seconds",
    "energy_joules", "energy_usd", "idle_usd", "hardware_usd", "api_usd", "usd", "carbon_grams",
    "estimated",
)  # fmt: skip


def render_usage(report: UsageReport, money: Currency) -> Group:
    """The report for 80 columns and more."""
    parts: list[RenderableType] = [Text(_heading(report)), _table(report, money)]
    if report.references:
        parts.append(_elsewhere(report, money))
    if report.budgets:
        parts.append(_budgets(report, money))
    parts.append(Text("\n".join(notes(report, money))))
    return Group(*parts)


def _heading(report: UsageReport) -> str:
    begin = "the beginning" if report.since_unix is None else _moment(report.since_unix)
    return f"Usage by {report.by}, from {begin} to {_moment(report.made_unix)}"


def _moment(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _table(report: UsageReport, money: Currency) -> Table:
    table = _plain_table()
    table.add_column(report.by, overflow="fold")
    for heading in ("requests", "failed", "prompt", "cached", "output", "energy", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    if report.carbon_grams_per_kwh is not None:
        table.add_column("CO2e", justify="right")
    for row in report.rows:
        table.add_row(*_plain(_cells(row, money)))
    table.add_section()
    table.add_row(*_plain(_cells(report.total, money)), style="bold")
    return table


def _plain(cells: Iterable[str]) -> Iterator[Text]:
    """Names of keys and tenants are anybody's: brackets in them are no markup."""
    return map(Text, cells)


def _plain_table(title: str | None = None) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left"
    )


def _cells(row: UsageRow, money: Currency) -> list[str]:
    cells = [
        _name(row.name),
        f"{row.requests:,}",
        f"{row.errors:,}",
        _tokens(row.prompt_tokens),
        _tokens(row.cached_tokens),
        _tokens(row.completion_tokens),
        f"{_energy(row.energy_joules)}{'*' if row.estimated else ''}",
        f"{money.text(row.usd)}{'*' if row.estimated else ''}",
    ]
    if row.carbon_grams is not None:
        cells.append(_grams(row.carbon_grams))
    return cells


def _name(name: str) -> str:
    return "(none)" if name == "-" else name


def _tokens(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:,.0f} {unit}"
            )
    return f"{count:,}"


def _energy(joules: float) -> str:
    return f"{joules / _KWH:,.2f} kWh" if joules >= _KWH / 10 else f"{joules / 3600:,.2f} Wh"


def _grams(grams: float) -> str:
    return f"{grams / 1000:,.1f} kg" if grams >= 1000 else f"{grams:,.1f} g"


def _elsewhere(report: UsageReport, money: Currency) -> Table:
    table = _plain_table("The same requests elsewhere, at the prices of their days")
    table.add_column("model", overflow="fold")
    for heading in ("cost there", "cost here", "saving"):
        table.add_column(heading, justify="right")
    for reference, there_usd, saving in _comparison(report):
        table.add_row(reference, money.text(there_usd), money.text(report.total.usd), saving)
    return table


def _comparison(report: UsageReport) -> Iterator[tuple[str, float, str]]:
    for reference, usd in sorted(report.total.elsewhere_usd.items(), key=lambda item: item[1]):
        yield reference, usd, saving_text(100 * (1 - report.total.usd / usd) if usd else None)


def _budgets(report: UsageReport, money: Currency) -> Table:
    table = _plain_table("Budgets, of the calendar day or month in UTC")
    for heading in ("budget", "period"):
        table.add_column(heading, overflow="fold")
    for heading in ("cost", "of", "tokens", "of", "used"):
        table.add_column(heading, justify="right")
    for use in report.budgets:
        table.add_row(
            *_plain(_budget_cells(use, money)), style="bold red" if _share(use) >= 1 else ""
        )
    return table


def _budget_cells(use: BudgetUse, money: Currency) -> list[str]:
    budget = use.budget
    return [
        f"{budget.kind} {budget.name}",
        budget.period,
        money.text(use.usd),
        money.text(budget.usd),
        _tokens(use.tokens),
        "-" if budget.tokens is None else _tokens(budget.tokens),
        f"{_share(use):.0%}",
    ]


def _share(use: BudgetUse) -> float:
    """How much of the tighter limit is gone."""
    shares = [
        used / limit
        for used, limit in ((use.usd, use.budget.usd), (use.tokens, use.budget.tokens))
        if limit
    ]
    return max(shares, default=0.0)


def notes(report: UsageReport, money: Currency) -> list[str]:
    """What a reader must know of the figures."""
    lines = [
        "Cost is energy, idle hours and hardware as they were charged when each request ended, and "
        "what other servers' answers cost."
    ]
    if report.total.estimated:
        lines.append("* rests on estimates, in part at least.")
    if report.references:
        lines.append(f"Prices: {report.prices_source}.")
    if report.carbon_grams_per_kwh is not None:
        lines.append(f"CO2e: {report.carbon_grams_per_kwh:g} g/kWh, as configured.")
    if money.code != "USD":
        lines.append(f"1 {money.code} = {money.usd_per_unit:g} USD.")
    return lines


def usage_csv(report: UsageReport) -> str:
    """A line for each row, amounts in USD and unrounded; what each model would have charged comes last."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((report.by, *_CSV_COLUMNS, *(f"usd at {name}" for name in report.references)))
    for row in report.rows:
        there = (row.elsewhere_usd[name] for name in report.references)
        writer.writerow((row.name, *(getattr(row, name) for name in _CSV_COLUMNS), *there))
    return file.getvalue()


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b2330; --soft: #5b6678; --line: #dfe3ea;
  --accent: #0f766e; --bad: #c2413b; }
@media (prefers-color-scheme: dark) { :root { --page: #11151c; --card: #1a202b; --ink: #e7ebf2; --soft: #9aa6b8;
  --line: #2d3645; --accent: #2dd4bf; --bad: #f07167; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 1.1rem; margin: 30px 0 10px; }
p { margin: 8px 0; } .soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 550; font-size: .86rem; }
th:first-child, td:first-child { text-align: left; } tr.all td { font-weight: 650; } td.bad { color: var(--bad); font-weight: 600; }
td.bar { width: 22%; min-width: 90px; } td.bar i { display: block; height: 12px; border-radius: 0 3px 3px 0; background: var(--accent); }
@media (max-width: 600px) { main { padding: 18px 12px 40px; } table, th { font-size: .8rem; } th, td { padding: 5px 5px; }
  td.bar, th.bar, .by :is(td, th):is(:nth-child(3), :nth-child(5), :nth-child(7), :nth-child(9)) { display: none; }
  th, td { padding: 5px 3px; } td:first-child { white-space: normal; min-width: 5.6em; overflow-wrap: break-word; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #1b2330; --soft: #5b6678; --line: #dfe3ea;
  --accent: #0f766e; --bad: #c2413b; } * { print-color-adjust: exact; } main { max-width: none; padding: 0; } }
"""


def usage_html(report: UsageReport, money: Currency) -> str:
    """One page without scripts that asks for nothing."""
    total = report.total
    tiles = [
        (money.text(total.usd), f"in all{' (estimated)' if total.estimated else ''}"),
        (f"{total.requests:,}", f"requests, {total.errors:,} of them failed"),
        (_tokens(total.prompt_tokens), f"prompt tokens, {_tokens(total.cached_tokens)} cached"),
        (_tokens(total.completion_tokens), "generated tokens"),
        (_energy(total.energy_joules), "energy"),
    ]
    if total.carbon_grams is not None:
        tiles.append((_grams(total.carbon_grams), "CO2 equivalent"))
    body = [
        f"<h1>{escape(_heading(report))}</h1>",
        '<div class="tiles">',
        *(
            f'<div class="card"><b>{escape(n)}</b><span class="soft">{t}</span></div>'
            for n, t in tiles
        ),
        "</div>",
        f"<h2>By {report.by}</h2>",
        _html_rows(report, money),
    ]
    if report.references:
        rows = (
            f"<tr><td>{escape(name)}</td><td>{money.text(usd)}</td><td>{money.text(total.usd)}</td>"
            f"<td{' class=bad' if saving.startswith('LOSS') else ''}>{saving}</td></tr>"
            for name, usd, saving in _comparison(report)
        )
        body.append(
            '<h2>The same requests elsewhere</h2><div class="card"><table><thead><tr><th>model</th><th>cost there</th>'
            f"<th>cost here</th><th>saving</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    if report.budgets:
        rows = (
            "<tr>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in _budget_cells(use, money)[:-1])
            + f"<td{' class=bad' if _share(use) >= 1 else ''}>{_share(use):.0%}</td></tr>"
            for use in report.budgets
        )
        body.append(
            '<h2>Budgets</h2><div class="card"><table><thead><tr><th>budget</th><th>period</th><th>cost</th><th>of</th>'
            f"<th>tokens</th><th>of</th><th>used</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
    body += (f'<p class="soft">{escape(note)}</p>' for note in notes(report, money))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_heading(report))}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _html_rows(report: UsageReport, money: Currency) -> str:
    carbon = report.carbon_grams_per_kwh is not None
    dearest = max((row.usd for row in report.rows), default=0.0)
    headings = ["requests", "failed", "prompt", "cached", "output", "energy", "cost"]
    head = "".join(f"<th>{name}</th>" for name in [report.by, *headings, *["CO2e"] * carbon])

    def line(row: UsageRow, kind: str, width: float) -> str:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row, money))
        return (
            f'<tr{kind}>{cells}<td class="bar"><i style="width:{100 * width:.1f}%"></i></td></tr>'
        )

    rows = "".join(line(row, "", row.usd / dearest if dearest else 0.0) for row in report.rows)
    return (
        f'<div class="card"><table class="by"><thead><tr>{head}<th class="bar"></th></tr></thead><tbody>{rows}'
        f"{line(report.total, ' class=all', 0.0)}</tbody></table></div>"
    )
