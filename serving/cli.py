"""The `rigserve` command: parse, call, print. No logic lives here."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from loadtest.options import BenchOptions, parse_duration
from loadtest.prompts import CORPUS_PATH
from loadtest.run import run_bench
from serving import __version__
from serving.admin.commands import add_config_actions, add_models_command
from serving.config import ConfigError, config_json_schema, load_config, located
from serving.cost.comparison import compare
from serving.cost.ledger import LedgerError, read_traffic
from serving.cost.prices import PriceBook, UnknownModel
from serving.cost.render import render
from serving.database import DatabaseError
from serving.deployment.commands import InitError, add_init_command
from serving.gateway.filters import filters_of
from serving.keys.commands import add_keys_command
from serving.logs import LogError, lines_of, set_up
from serving.maintenance.backup import BackupError
from serving.maintenance.commands import add_maintenance_commands
from serving.models.commands import add_convert_action
from serving.models.sources import ModelError
from serving.protocol.errors import ApiError
from serving.quantization.commands import add_quantize_action
from serving.serve import ServeError, ledger_path, log_folder, serve

_DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "default.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for bad input)."""
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args)
    except (
        ApiError,
        BackupError,
        ConfigError,
        DatabaseError,
        InitError,
        LedgerError,
        LogError,
        ModelError,
        ServeError,
        UnknownModel,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rigserve",
        description="Private, metered LLMs on your own GPU, behind an OpenAI-compatible API.",
    )
    parser.add_argument("--version", action="version", version=f"rigserve {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("serve", help="launch the models of a config behind the API")
    _add_config(command)
    command.add_argument("--verbose", action="store_true", help="log what the libraries say, too")
    command.set_defaults(run=_serve)

    command = commands.add_parser("bench", help="load-test a server and price its tokens")
    command.add_argument("--users", type=int, default=8, help="concurrent users (default: 8)")
    command.add_argument(
        "--duration", type=_duration, default=30.0, help="such as 30s, 2m, 1h (default: 30s)"
    )
    command.add_argument(
        "--prompt-tokens", type=int, default=78, help="prompt length (default: 78)"
    )
    command.add_argument(
        "--output-tokens", type=int, default=128, help="completion length (default: 128)"
    )
    command.add_argument(
        "--url", default="http://127.0.0.1:8000/v1", help="any OpenAI-compatible API"
    )
    command.add_argument("--model", help="default: the first that the server lists")
    command.add_argument("--api-key", help="default: $OPENAI_API_KEY")
    command.add_argument("--out", type=Path, help="folder for the report (default: bench-TIME)")
    command.add_argument("--web", action="store_true", help="steer it from Locust's web UI")
    command.add_argument("--seed", type=int, default=0, help="chooses the prompts (default: 0)")
    command.add_argument(
        "--config", type=Path, default=_DEFAULT_CONFIG, help="its cost section prices the tokens"
    )
    command.set_defaults(run=_bench)

    command = commands.add_parser("cost", help="what the metered tokens cost here and elsewhere")
    _add_config(command)
    command.add_argument("--since", type=_duration, help="only the last 30m, 24h, 7d")
    command.add_argument("--model", help="only this model")
    command.set_defaults(run=_cost)

    command = commands.add_parser("logs", help="show what the engines of a config print")
    command.add_argument("model", metavar="MODEL", nargs="?", help="default: all models' engines")
    command.add_argument("-f", "--follow", action="store_true", help="go on as they print more")
    command.add_argument(
        "-n", "--lines", type=_count, default=100, help="begin with the last so many (default: 100)"
    )
    command.add_argument(
        "--config", metavar="CONFIG", type=Path, default=_DEFAULT_CONFIG, help="the server's config"
    )
    command.set_defaults(run=_logs)

    add_keys_command(commands, default_config=_DEFAULT_CONFIG, duration=_duration)

    add_init_command(commands)
    add_maintenance_commands(commands, default_config=_DEFAULT_CONFIG)

    actions = add_models_command(commands)
    add_convert_action(actions)
    add_quantize_action(actions, default_config=_DEFAULT_CONFIG, text_path=CORPUS_PATH)

    command = commands.add_parser("config", help="check a config, or describe its format")
    actions = command.add_subparsers(metavar="ACTION", required=True)
    action = actions.add_parser("check", help="list everything that is wrong with a file")
    _add_config(action)
    action.set_defaults(run=_config_check)
    action = actions.add_parser("schema", help="print the JSON Schema, for editors")
    action.set_defaults(run=_config_schema)
    add_config_actions(actions)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config",
        metavar="CONFIG",
        type=Path,
        nargs="?",
        default=_DEFAULT_CONFIG,
        help="YAML file (default: the embedded model's)",
    )


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"not a number of lines: {text!r}")
    return int(text)


def _serve(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    set_up(config.logging, log_folder(config), verbose=args.verbose)
    with located(args.config):
        serve(config, args.config)
    return 0


def _logs(args: argparse.Namespace) -> int:
    folder = log_folder(load_config(args.config))
    with contextlib.suppress(KeyboardInterrupt):
        for line in lines_of(folder, args.model, args.lines, follow=args.follow):
            print(line, flush=True)
    return 0


def _bench(args: argparse.Namespace) -> int:
    cost = load_config(args.config).cost
    return run_bench(
        BenchOptions(
            url=args.url,
            model=args.model,
            api_key=args.api_key,
            users=args.users,
            duration_seconds=args.duration,
            prompt_tokens=args.prompt_tokens,
            output_tokens=args.output_tokens,
            out=args.out,
            web=args.web,
            seed=args.seed,
            cost=cost,
        )
    )


def _cost(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    since = None if args.since is None else time.time() - args.since
    traffic = read_traffic(ledger_path(config), since=since, model=args.model)
    Console().print(render(compare(traffic, config.cost, PriceBook(config.cost.compare_to))))
    return 0


def _config_check(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    with located(args.config):
        filters_of(config.models, lenient=config.server.lenient)
    names = ", ".join(model.name for model in config.models)
    print(f"{args.config}: ok; serves {names} on {config.server.host}:{config.server.port}")
    return 0


def _config_schema(_args: argparse.Namespace) -> int:
    print(json.dumps(config_json_schema(), indent=2))
    return 0
