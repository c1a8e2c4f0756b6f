"""`rigserve keys`: its words, and what they do. It works on the database, with or without a running server."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from serving.config import load_config
from serving.keys.key import Key
from serving.keys.render import key_table, keys_table, moment_text
from serving.keys.store import KeyStore
from serving.protocol.keys import BudgetPeriod, NewKey
from serving.protocol.requests import validated
from serving.protocol.tenancy import Priority

_TOLD_ONCE = "This is its secret. It is not kept and cannot be shown again:"


def add_keys_command(
    commands: Any, *, default_config: Path, duration: Callable[[str], float]
) -> None:
    """Add ``keys`` to the ``commands`` of argparse. What it runs raises ``ApiError`` and ``DatabaseError``."""
    command = commands.add_parser("keys", help="make, list, show, revoke and rotate API keys")
    actions = command.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        parser = actions.add_parser(name, help=text)
        parser.add_argument("--config", type=Path, default=default_config, help="whose data_dir")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)
        return parser

    create = action("create", _create, "make a key; its secret is printed once")
    create.add_argument("name", metavar="NAME", help="what to call it")
    create.add_argument("--tenant", help="for whom it is (default: NAME)")
    create.add_argument("--weight", type=float, help="the tenant's share of a busy engine")
    create.add_argument("--priority", choices=get_args(Priority), help="the tenant's class")
    create.add_argument(
        "--models", metavar="A,B", type=_names, help="only these models, adapters and routes"
    )
    create.add_argument("--requests-per-minute", metavar="N", type=int)
    create.add_argument("--tokens-per-minute", metavar="N", type=int)
    create.add_argument("--max-concurrent", metavar="N", type=int, help="requests at once")
    create.add_argument("--budget-usd", metavar="USD", type=float, help="cost in a period")
    create.add_argument("--budget-tokens", metavar="N", type=int, help="tokens in a period")
    create.add_argument(
        "--budget-period", choices=get_args(BudgetPeriod), help="of UTC's calendar (default: month)"
    )
    create.add_argument("--expires", metavar="TIME", type=duration, help="such as 12h, 90d")
    create.add_argument("--admin", action="store_true", help="it opens the admin API, too")

    action("list", _list, "all keys")
    for name, run, text in (
        ("show", _show, "one key"),
        ("revoke", _revoke, "end a key for good"),
        ("rotate", _rotate, "give a key a new secret"),
    ):
        parser = action(name, run, text)
        parser.add_argument("name", metavar="KEY", help="its id or its name")
        if name == "rotate":
            parser.add_argument(
                "--grace",
                metavar="TIME",
                type=duration,
                default=0.0,
                help="how long the old secret is still good, such as 30m, 7d (default: not at all)",
            )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _create(args: argparse.Namespace) -> int:
    fields: dict[str, Any] = {
        name: given
        for name in NewKey.model_fields
        if (given := getattr(args, name, None)) is not None
    }
    if args.expires is not None:
        fields["expires_in_seconds"] = int(args.expires)
    asked = validated(NewKey, fields | {"is_admin": args.admin})
    _tell_of_unknown(asked.models or (), args.config)
    with closing(_store(args)) as store:
        key, secret = store.create(asked)
    _print_key(args, key, secret)
    return 0


def _list(args: argparse.Namespace) -> int:
    with closing(_store(args)) as store:
        keys = store.all()
    now = time.time()
    if args.json:
        print(json.dumps([key.to_json(now) for key in keys], indent=2))
    else:
        Console().print(keys_table(keys, now))
    return 0


def _show(args: argparse.Namespace) -> int:
    with closing(_store(args)) as store:
        key = store.get(args.name)
    _print_key(args, key)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    with closing(_store(args)) as store:
        key = store.revoke(args.name)
    _print_key(args, key)
    return 0


def _rotate(args: argparse.Namespace) -> int:
    with closing(_store(args)) as store:
        key, secret = store.rotate(args.name, args.grace)
    _print_key(args, key, secret)
    if args.grace and not args.json:
        print(f"The secret before it is good until {moment_text(time.time() + args.grace)}.")
    return 0


def _tell_of_unknown(models: Iterable[str], file: Path) -> None:
    """A key may be for models that are still to come; or there is a typing error in one."""
    config = load_config(file)
    served = {
        *(route.name for route in config.routes),
        *(
            name
            for model in config.models
            for name in (model.name, *model.aliases, *(adapter.name for adapter in model.adapters))
        ),
    }
    if unknown := sorted(set(models) - served):
        print(f"note: {file} serves no {', '.join(unknown)}", file=sys.stderr)


def _store(args: argparse.Namespace) -> KeyStore:
    return KeyStore(Path(load_config(args.config).storage.data_dir))


def _print_key(args: argparse.Namespace, key: Key, secret: str | None = None) -> None:
    told = key.to_json(time.time())
    if args.json:
        print(json.dumps(told if secret is None else {**told, "secret": secret}, indent=2))
        return
    Console().print(key_table(told))
    if secret is not None:
        # Not through the console, which would break the line where the terminal ends.
        print(f"{_TOLD_ONCE}\n\n{secret}\n")
