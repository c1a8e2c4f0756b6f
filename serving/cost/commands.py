"""`rigserve cost`: its words, and what they do."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from serving.config import Config, load_config
from serving.cost.comparison import CostReport, compare
from serving.cost.ledger import read_traffic, read_usage
from serving.cost.money import Currency
from serving.cost.peers import book_to_compare_with
from serving.cost.price_data import UPDATE_URL, PriceData, price_data, update
from serving.cost.prices import PriceBook, has_prices
from serving.cost.render import render
from serving.cost.rollup import Dimension, Selection
from serving.cost.traffic import Cuts
from serving.cost.usage_render import render_usage, usage_csv, usage_html
from serving.cost.usage_report import Budget, usage_report

_ACTIONS = ("verdict", "report", "prices")
_MOST_LISTED = 40


class CostCommandError(Exception):
    """A command cannot do what it was told; the message says why."""


@dataclass(frozen=True, slots=True)
class Accounts:
    """Of a config's data: where the ledger is, the names of keys by their ids, and all budgets."""

    ledger: Path
    key_names: Mapping[str, str]
    budgets: Sequence[Budget]


def with_action(arguments: Sequence[str]) -> list[str]:
    """``cost`` alone, or with a config, asks for the verdict."""
    given = list(arguments)
    if given[:1] == ["cost"] and not {*given[1:2]} & {*_ACTIONS, "-h", "--help"}:
        return ["cost", "verdict", *given[1:]]
    return given


def add_cost_command(
    commands: Any,
    *,
    default_config: Path,
    duration: Callable[[str], float],
    accounts: Callable[[Config], Accounts],
) -> None:
    """Add ``cost`` to the ``commands`` of argparse.

    What it runs raises ``ConfigError``, ``LedgerError``, ``UnknownModel``, ``PriceDataError``, ``DatabaseError``
    and :class:`CostCommandError`.
    """
    command = commands.add_parser("cost", help="what the metered tokens cost here and elsewhere")
    actions = command.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("verdict", help="here or elsewhere, and from when on (default)")
    _add_selection(action, default_config, duration)
    action.add_argument("--steps", action="store_true", help="print how each amount is computed")
    action.set_defaults(run=lambda args: _verdict(args, accounts))

    action = actions.add_parser("report", help="who used what, and what it cost")
    _add_selection(action, default_config, duration)
    action.add_argument(
        "--by", choices=get_args(Dimension), default="tenant", help="(default: tenant)"
    )
    action.add_argument(
        "--format", choices=("terminal", "csv", "html"), help="default: by --out's name"
    )
    action.add_argument("--out", type=Path, metavar="FILE", help="instead of the terminal")
    action.set_defaults(run=lambda args: _report(args, accounts))

    action = actions.add_parser("prices", help="what commercial models charge, and since when")
    _add_config(action, default_config)
    action.add_argument("--find", metavar="TEXT", help="models whose names have this in them")
    action.add_argument(
        "--update", action="store_true", help="fetch the newest prices over the network first"
    )
    action.add_argument(
        "--url",
        default=UPDATE_URL,
        help="where --update gets them (default: genai-prices' own)",
    )
    action.set_defaults(run=lambda args: _prices(args, accounts))


def _add_config(action: argparse.ArgumentParser, default: Path) -> None:
    action.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", default=default,
        help="YAML file (default: the embedded model's)",
    )  # fmt: skip


def _add_selection(
    action: argparse.ArgumentParser, default: Path, duration: Callable[[str], float]
) -> None:
    _add_config(action, default)
    action.add_argument("--since", type=duration, help="only the last 30m, 24h, 7d")
    action.add_argument("--model", help="only this model, with its adapters, or this adapter")


def _selection(args: argparse.Namespace) -> Selection:
    since = 0.0 if args.since is None else time.time() - args.since
    return Selection(since=since, model=args.model)


def _verdict(args: argparse.Namespace, accounts: Callable[[Config], Accounts]) -> int:
    config = load_config(args.config)
    ledger, selected = accounts(config).ledger, _selection(args)
    prices, basis = _book(config, ledger, selected)
    traffic = read_traffic(ledger, selected, prices.cuts)
    report: CostReport = compare(traffic, config.cost, prices, basis)
    Console().print(render(report, steps=args.steps))
    return 0


def _book(config: Config, ledger: Path, selected: Selection) -> tuple[PriceBook, str]:
    """The models to compare with: the operator's, or peers of the model that was used most."""
    data = price_data(ledger.parent)
    return book_to_compare_with(config.cost, data, lambda: _most_used(ledger, selected))


def _most_used(ledger: Path, selected: Selection) -> str:
    tokens: dict[str, int] = {}
    for each in read_usage(ledger, replace(selected, own_engines_only=True), Cuts(), "model"):
        used = each.tokens.prompt_tokens + each.tokens.completion_tokens
        tokens[each.key] = tokens.get(each.key, 0) + used
    return max(tokens, key=lambda name: tokens[name], default="")


def _report(args: argparse.Namespace, accounts: Callable[[Config], Accounts]) -> int:
    config = load_config(args.config)
    known, selected = accounts(config), _selection(args)
    prices, _ = _book(config, known.ledger, selected)
    report = usage_report(
        *(known.ledger, args.by, selected, config.cost, prices, known.budgets, known.key_names),
        now_unix=time.time(),
    )
    money = Currency.of(config.cost)
    form = args.format or _format_of(args.out)
    if form == "terminal":
        if args.out is not None:
            raise CostCommandError("--out needs --format csv or html, or a name that ends so")
        Console().print(render_usage(report, money))
        return 0
    text = usage_csv(report) if form == "csv" else usage_html(report, money)
    if args.out is None:
        print(text, end="")
        return 0
    try:
        args.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CostCommandError(f"--out {args.out}: {error.strerror}") from error
    print(f"Report: {args.out}")
    return 0


def _format_of(out: Path | None) -> str:
    suffix = "" if out is None else out.suffix.lower()
    return {".csv": "csv", ".html": "html", ".htm": "html"}.get(suffix, "terminal")


def _prices(args: argparse.Namespace, accounts: Callable[[Config], Accounts]) -> int:
    config = load_config(args.config)
    data_dir = accounts(config).ledger.parent
    data = update(data_dir, args.url) if args.update else price_data(data_dir)
    references = config.cost.compare_to if args.find is None else _found(args.find, data)
    money = Currency.of(config.cost)
    book = PriceBook(references, overrides=config.cost.prices, data=data)
    for reference in references:
        listed = book.per_million(reference)
        cached = listed.cached_input_usd
        extra = "" if cached is None else f", cached {money.rate(cached)}"
        print(
            f"{reference}: input {money.rate(listed.input_usd)}{extra}, "
            f"output {money.rate(listed.output_usd)}"
        )
    print(f"{money.code} per million tokens. Prices: {book.source}.")
    return 0


def _found(text: str, data: PriceData) -> list[str]:
    """References to models that have prices and this in their names."""
    wanted = text.lower()
    found = [
        f"{provider.id}/{model.id}"
        for provider in data.providers
        for model in provider.models
        if wanted in f"{provider.id}/{model.id}".lower() and has_prices(model)
    ]
    if not found:
        raise CostCommandError(f"--find {text!r}: no model with prices has that in its name")
    if len(found) > _MOST_LISTED:
        print(f"{len(found)} models; the first {_MOST_LISTED}:")
    return found[:_MOST_LISTED]
