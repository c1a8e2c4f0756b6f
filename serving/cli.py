"""The `rigserve` command: parse, call, print. No logic lives here."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from loadtest.commands import add_bench_command
from loadtest.prompts import CORPUS_PATH
from loadtest.scenario import parse_duration
from serving import __version__
from serving.admin.adapters import add_adapters_command
from serving.admin.commands import add_config_actions, add_models_command
from serving.cluster.commands import ClusterError, add_cluster_command
from serving.config import Config, ConfigError, config_json_schema, load_config, located
from serving.cost.commands import Accounts, CostCommandError, add_cost_command, with_action
from serving.cost.ledger import LedgerError
from serving.cost.price_data import PriceDataError
from serving.cost.prices import UnknownModel
from serving.cost.usage_report import Budget
from serving.database import DatabaseError
from serving.deployment.commands import InitError, add_init_command
from serving.doctor.commands import add_doctor_command
from serving.engines.commands import add_engines_command
from serving.engines.fitting import Fitting
from serving.engines.vllm.install import InstallError
from serving.gateway.filters import filters_of
from serving.keys.commands import add_keys_command
from serving.keys.store import KeyStore
from serving.logs import LogError, lines_of, set_up
from serving.maintenance.backup import BackupError
from serving.maintenance.commands import add_maintenance_commands
from serving.models.commands import add_checksum_action, add_convert_action
from serving.models.download_commands import add_download_actions
from serving.models.sources import ModelError
from serving.planner.commands import PlanError, add_plan_command, fit_warning
from serving.protocol.errors import ApiError
from serving.quantization.commands import add_quantize_action
from serving.serve import ServeError, ledger_path, log_folder, serve
from serving.site import launchers_of
from serving.tuning.commands import add_tune_command
from serving.tuning.subject import TuneError

_DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "default.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for bad input)."""
    given = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(with_action(given))
    try:
        status: int = args.run(args)
    except (
        ApiError,
        BackupError,
        ClusterError,
        ConfigError,
        CostCommandError,
        DatabaseError,
        InstallError,
        InitError,
        LedgerError,
        LogError,
        ModelError,
        PlanError,
        PriceDataError,
        ServeError,
        TuneError,
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

    add_cluster_command(commands, default_config=_DEFAULT_CONFIG)

    add_bench_command(commands, default_config=_DEFAULT_CONFIG)

    add_plan_command(commands, default_config=_DEFAULT_CONFIG)
    add_tune_command(commands, default_config=_DEFAULT_CONFIG, launchers_of=launchers_of)

    add_cost_command(
        commands, default_config=_DEFAULT_CONFIG, duration=_duration, accounts=_accounts
    )

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
    add_download_actions(actions, default_config=_DEFAULT_CONFIG, fit_warning=fit_warning)
    add_convert_action(actions)
    add_quantize_action(actions, default_config=_DEFAULT_CONFIG, text_path=CORPUS_PATH)
    add_checksum_action(actions)

    add_adapters_command(commands)

    add_engines_command(commands, default_config=_DEFAULT_CONFIG)

    add_doctor_command(commands, default_config=_DEFAULT_CONFIG)

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


def _accounts(config: Config) -> Accounts:
    with closing(KeyStore(Path(config.storage.data_dir))) as store:
        keys = store.all()
    of_keys = [
        Budget(
            "key", key.id, key.name, limits.budget_period, limits.budget_usd, limits.budget_tokens
        )
        for key in keys
        for limits in [key.allowance]
        if key.revoked_at is None and (limits.budget_usd or limits.budget_tokens)
    ]
    of_models = [
        Budget("model", model.name, model.name, model.budget_period, model.budget_usd)
        for model in config.remote_models
        if model.budget_usd
    ]
    names = {key.id: key.name for key in keys}
    return Accounts(ledger_path(config), names, [*of_keys, *of_models])


def _config_check(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    with located(args.config):
        filters_of(config.models, lenient=config.server.lenient)
        fitting = Fitting(config, launchers_of(config))
        lines = (*fitting.check(), *fitting.fill(fetch=False).lines)
    names = ", ".join(model.name for model in config.models)
    print(f"{args.config}: ok; serves {names} on {config.server.host}:{config.server.port}")
    for line in lines:
        print(line)
    return 0


def _config_schema(_args: argparse.Namespace) -> int:
    print(json.dumps(config_json_schema(), indent=2))
    return 0
