"""`rigserve adapters`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from serving.admin.client import ask
from serving.admin.commands import PAGE_WIDTH, add_server

_SHOWN_DIGITS = 12


def add_adapters_command(commands: Any) -> None:
    """``rigserve adapters``, among the parser's ``commands``."""
    command = commands.add_parser(
        "adapters", help="add, remove and list LoRA adapters of a running server"
    )
    actions = command.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("list", help="list all adapters: the config's, and those added")
    action.add_argument("--json", action="store_true", help="print JSON, which has more of each")
    add_server(action)
    action.set_defaults(run=_list)

    action = actions.add_parser("add", help="serve an adapter from now on, also after a restart")
    action.add_argument("name", metavar="NAME", help="what clients ask for")
    action.add_argument(
        "path", metavar="PATH", type=Path, help="a folder of PEFT's or a GGUF file, on the server"
    )
    action.add_argument("--model", metavar="MODEL", required=True, help="its base")
    action.add_argument(
        "--scale", type=float, default=1.0, help="how strongly it counts; 1: as trained"
    )
    action.add_argument("--sha256", metavar="DIGEST", help="what it must have")
    action.add_argument(
        "--replace",
        action="store_true",
        help="take the place of the one of that name; requests under way finish with that",
    )
    add_server(action)
    action.set_defaults(run=_add)

    action = actions.add_parser("remove", help="serve an added adapter no more")
    action.add_argument("name", metavar="NAME")
    add_server(action)
    action.set_defaults(run=_remove)


def _add(args: argparse.Namespace) -> int:
    body = {
        "name": args.name,
        "model": args.model,
        "path": str(args.path.absolute()),
        "scale": args.scale,
        "sha256": args.sha256,
        "replace": args.replace,
    }
    told = ask(args.server, "POST", "/admin/adapters", body, accept=(201,))
    print(f"{told['id']}: {told['state']}, of {told['parent']}, SHA-256 {told['sha256']}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    told = ask(args.server, "DELETE", f"/admin/adapters/{quote(args.name)}")
    rest = f" with the last of {told['in_flight']} requests" if told["in_flight"] else ""
    print(f"{told['id']}: {told['state']}{rest}")
    return 0


def _list(args: argparse.Namespace) -> int:
    told = ask(args.server, "GET", "/admin/adapters")["data"]
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    console = Console()
    # What is read by a program must not be folded to 80 columns.
    console.width = console.width if console.is_terminal else max(console.width, PAGE_WIDTH)
    console.print(table_of(told))
    for adapter in told:
        if adapter["reason"]:
            print(f"{adapter['id']}: {adapter['reason']}")
    return 0


def table_of(adapters: list[dict[str, Any]]) -> Table:
    """What `rigserve adapters list` prints of the server's answer."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("ADAPTER", "MODEL", "STATE", "FROM", "PATH", "SHA-256"):
        table.add_column(title, overflow="fold")
    for title in ("SCALE", "BUSY"):
        table.add_column(title, justify="right", no_wrap=True)
    for adapter in adapters:
        table.add_row(
            *(adapter["id"], adapter["parent"], adapter["state"], adapter["source"] or "-"),
            *(adapter["path"], (adapter["sha256"] or "-")[:_SHOWN_DIGITS]),
            *(f"{adapter['scale']:g}", str(adapter["in_flight"])),
        )
    return table
