"""`rigserve backup`, `restore` and `upgrade --check`: their words, and what they print."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from serving.config import ConfigError, load_config
from serving.maintenance.backup import BackupError, back_up, restore
from serving.maintenance.upgrade import check_upgrade


def add_maintenance_commands(commands: Any, *, default_config: Path) -> None:
    """Add them to the ``commands`` of argparse. What they run raises ``BackupError`` and ``ConfigError``."""

    def add(name: str, run: Any, text: str) -> Any:
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "config",
            metavar="CONFIG",
            type=Path,
            nargs="?",
            default=default_config,
            help="the server's (default: the embedded model's)",
        )
        command.set_defaults(run=run)
        return command

    command = add("backup", _backup, "save ledger, keys, responses, batches and config to a file")
    command.add_argument("--out", type=Path, help="the file (default: rigserve-TIME.tar.gz)")
    command = add("restore", _restore, "put back what a backup holds, while no server runs")
    command.add_argument("--from", dest="archive", type=Path, required=True, help="the backup")
    command.add_argument(
        "--data-dir", type=Path, help="where to (default: storage.data_dir of CONFIG)"
    )
    command = add("upgrade", _upgrade, "what this version will do to the data of an older one")
    command.add_argument(
        "--check", action="store_true", required=True, help="try it on copies; change nothing"
    )


def _backup(args: argparse.Namespace) -> int:
    data_dir = Path(load_config(args.config).storage.data_dir)
    out = args.out or Path(time.strftime("rigserve-%Y%m%d-%H%M%S.tar.gz"))
    backup = back_up(data_dir, args.config, out)
    print(f"{out}: {len(backup.digests)} files of {data_dir}, and {args.config}")
    return 0


def _restore(args: argparse.Namespace) -> int:
    had_config = args.config.exists()
    if args.data_dir is None and not had_config:
        raise BackupError(
            f"there is no {args.config} to say where the data goes; name --data-dir, and it is made "
            "from the backup"
        )
    data_dir = args.data_dir or Path(load_config(args.config).storage.data_dir)
    backup, aside = restore(args.archive, data_dir, args.config)
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(backup.made_unix))
    print(f"{data_dir}: as it was at {made}, by rigserve {backup.version}")
    if aside is not None:
        print(f"what was there before is in {aside}")
    if not had_config:
        print(f"{args.config}: made from the backup")
    return 0


def _upgrade(args: argparse.Namespace) -> int:
    problems = 0
    try:
        config = load_config(args.config)
    except ConfigError as error:
        print(f"{args.config}: {error}")
        return 1
    print(f"{args.config}: ok")
    data_dir = Path(config.storage.data_dir)
    for outcome in check_upgrade(data_dir):
        if outcome.problem is not None:
            problems += 1
            print(f"{outcome.name}: cannot be taken on: {outcome.problem}")
        elif outcome.before == outcome.after:
            print(f"{outcome.name}: format {outcome.before}, nothing to do")
        else:
            print(
                f"{outcome.name}: format {outcome.before} becomes {outcome.after} when the server starts; "
                "older versions cannot read it then: make a backup"
            )
    return 1 if problems else 0
