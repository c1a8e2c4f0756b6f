"""`rigserve models` and `rigserve config status|reload`."""

from __future__ import annotations

import argparse
import json
import os
from datetime import datetime
from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from serving.admin.client import ask

_SERVER_VARIABLE = "RIGSERVE_SERVER"
_DEFAULT_SERVER = "http://127.0.0.1:8000"
PAGE_WIDTH = 160


def add_models_command(commands: Any) -> Any:
    """``rigserve models``, among the parser's ``commands``; returns its actions, for more of them."""
    command = commands.add_parser(
        "models", help="see, load and unload a running server's models; prepare others"
    )
    actions = command.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("ps", help="list all models: loaded or not, memory, requests")
    action.add_argument("--json", action="store_true", help="print JSON, which has more of each")
    add_server(action)
    action.set_defaults(run=_ps)

    action = actions.add_parser("load", help="load a model; returns when it takes requests")
    action.add_argument("model", metavar="MODEL", help="its name or an alias")
    add_server(action)
    action.set_defaults(run=_load)

    action = actions.add_parser("unload", help="unload a model; returns when its memory is free")
    action.add_argument("model", metavar="MODEL", help="its name or an alias")
    action.add_argument("--force", action="store_true", help="break off requests in flight")
    add_server(action)
    action.set_defaults(run=_unload)
    return actions


def add_config_actions(actions: Any) -> None:
    """``rigserve config status|reload``, among the ``actions`` of ``rigserve config``."""
    action = actions.add_parser("status", help="whether a running server uses its file as it is")
    add_server(action)
    action.set_defaults(run=_config_status)
    action = actions.add_parser("reload", help="have a running server take up its file")
    add_server(action)
    action.set_defaults(run=_config_reload)


def add_server(command: argparse.ArgumentParser) -> None:
    """``--server``, for a command that speaks to a running one."""
    command.add_argument(
        "--server",
        metavar="URL",
        default=os.environ.get(_SERVER_VARIABLE, _DEFAULT_SERVER),
        help=f"default: ${_SERVER_VARIABLE}, or {_DEFAULT_SERVER}; an admin key from $RIGSERVE_API_KEY",
    )


def _ps(args: argparse.Namespace) -> int:
    told = ask(args.server, "GET", "/admin/models")
    if args.json:
        print(json.dumps(told["data"], indent=2))
        return 0
    console = Console()
    # What is read by a program must not be folded to 80 columns.
    console.width = console.width if console.is_terminal else max(console.width, PAGE_WIDTH)
    console.print(table_of(told["data"]))
    for model in told["data"]:
        if model["failure"]:
            print(f"{model['id']}: {model['failure']}")
    return 0


def _load(args: argparse.Namespace) -> int:
    told = ask(args.server, "POST", f"/admin/models/{quote(args.model)}/load")
    print(f"{told['id']}: {told['state']}")
    return 0


def _unload(args: argparse.Namespace) -> int:
    query = "?force=true" if args.force else ""
    told = ask(args.server, "POST", f"/admin/models/{quote(args.model)}/unload{query}")
    print(f"{told['id']}: {told['state']}")
    return 0


def _config_status(args: argparse.Namespace) -> int:
    return _print_status(ask(args.server, "GET", "/admin/reload"))


def _config_reload(args: argparse.Namespace) -> int:
    return _print_status(ask(args.server, "POST", "/admin/reload", accept=(200, 409)))


def _print_status(told: dict[str, Any]) -> int:
    when = datetime.fromtimestamp(told["at_unix"]).astimezone().isoformat(timespec="seconds")
    outcome = "in use" if told["ok"] else "REFUSED, the server goes on with what it had"
    print(f"{told['file']}: {outcome} (read {when})")
    print(told["message"])
    if told["reloading"]:
        starting = ", ".join(told["starting"])
        print(f"a change is being taken up now{f'; starting: {starting}' if starting else ''}")
    elif told["file_changed"]:
        print("the file has changed since; `rigserve config reload` takes it up")
    if told["draining"]:
        print(f"finishing their last requests: {', '.join(told['draining'])}")
    return 0 if told["ok"] else 1


def table_of(models: list[dict[str, Any]]) -> Table:
    """What `rigserve models ps` prints of the server's answer. In 80 columns long names are folded, nothing is cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("MODEL", "STATE", "DEVICE"):
        table.add_column(title, overflow="fold")
    table.add_column("MEMORY", no_wrap=True)
    for title in ("BUSY", "WAIT", "IDLE", "TTL"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in models:
        table.add_row(
            model["id"],
            model["state"],
            ", ".join(model["devices"]) or "-",
            _memory(model),
            str(model["in_flight"]),
            str(model["waiting"]),
            _seconds(model["idle_seconds"]),
            "pinned" if model["pinned"] else _seconds(model["ttl_seconds"]),
        )
    return table


def _memory(model: dict[str, Any]) -> str:
    """What is set aside for the model, or would be, and how that is known."""
    memory = model["memory"]
    if not memory:
        return "-"
    by_device = memory["reserved_mib"] or memory["needed_mib"]
    amounts = "+".join(str(mib) for mib in by_device.values() if mib)
    return f"{'~' if memory['source'] == 'estimated' else ''}{amounts} MiB"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}m" if seconds < 6000 else f"{seconds / 3600:.0f}h"
