"""``rigserve bench``: its arguments, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from loadtest.arguments import count, positive
from loadtest.options import BenchOptions, Join, overridden
from loadtest.run import run_bench, run_worker
from loadtest.scenario import DEFAULT, load_scenario, names, parse_duration
from serving.config import load_config


def add_bench_command(commands: Any, *, default_config: Path) -> None:
    """Add it to the commands of a parser."""
    command = commands.add_parser(
        "bench",
        help="load-test a server and price its tokens",
        description=f"Load-test any OpenAI-compatible server. Scenarios: {', '.join(names())}.",
    )
    command.add_argument(
        "scenario", metavar="SCENARIO", nargs="?", default=DEFAULT,
        help=f"a name of the above, or the path to a YAML file (default: {DEFAULT})",
    )  # fmt: skip
    command.add_argument("--url", default="http://127.0.0.1:8000/v1", help="where the server is")
    command.add_argument("--model", help="default: the first that the server lists")
    command.add_argument("--api-key", help="default: $OPENAI_API_KEY")
    command.add_argument("--out", type=Path, help="folder for the report (default: bench-TIME)")
    command.add_argument("--seed", type=int, default=0, help="chooses the prompts (default: 0)")
    instead = command.add_argument_group("instead of what the scenario says")
    instead.add_argument("--users", type=count, help="so many users that wait for their answers")
    instead.add_argument("--rate", type=positive, help="so many requests a second that do not wait")
    instead.add_argument("--duration", type=_duration, help="of each stage, such as 30s, 2m, 1h")
    instead.add_argument("--prompt-tokens", type=count, help="length of all prompts")
    instead.add_argument("--output-tokens", type=count, help="length of all completions")
    gate = command.add_argument_group("conditions; exit status 3 if one does not hold")
    gate.add_argument(
        "--slo", action="append", default=[], metavar="CONDITION",
        help="such as 'ttft p95 < 500ms', 'tokens/s > 100', 'goodput >= 95%%', 'errors < 1%%'; again for more",
    )  # fmt: skip
    gate.add_argument(
        "--baseline", type=Path, metavar="REPORT.JSON", help="surely no worse than that run"
    )
    many = command.add_argument_group("more than one process")
    many.add_argument(
        "--workers",
        type=_number,
        default=0,
        help="processes of this machine that send (default: this one)",
    )
    many.add_argument("--remote-workers", type=_number, default=0, help="wait for so many --join")
    many.add_argument(
        "--bind", type=_address, metavar="HOST:PORT", help="where they join (default: loopback)"
    )
    many.add_argument(
        "--join", type=_address, metavar="HOST:PORT", help="be a worker of the bench there"
    )
    command.add_argument("--web", action="store_true", help="steer the users from Locust's web UI")
    command.add_argument(
        "--config", type=Path, default=default_config, help="its cost section prices the tokens"
    )
    command.set_defaults(run=lambda args: _bench(args, command))


def _bench(args: argparse.Namespace, command: argparse.ArgumentParser) -> int:
    if args.join is not None:
        host, port = args.join
        _refuse_what_a_worker_is_told(args, command)
        return run_worker(Join(host, port, args.api_key))
    if args.bind is not None and not args.remote_workers:
        command.error("argument --bind: needs --remote-workers, or nobody joins there")
    name, scenario = load_scenario(args.scenario)
    scenario = overridden(
        scenario,
        users=args.users,
        requests_per_second=args.rate,
        duration_seconds=args.duration,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
    )
    config = load_config(args.config)
    return run_bench(
        BenchOptions(
            url=args.url,
            scenario_name=name,
            scenario=scenario,
            cost=config.cost,
            model=args.model,
            api_key=args.api_key,
            out=args.out,
            web=args.web,
            seed=args.seed,
            workers=args.workers,
            remote_workers=args.remote_workers,
            bind=args.bind,
            slo=tuple(args.slo),
            baseline=args.baseline,
            prices_dir=Path(config.storage.data_dir),
        )
    )


def _refuse_what_a_worker_is_told(
    args: argparse.Namespace, command: argparse.ArgumentParser
) -> None:
    """What to send, and where, a worker hears from the bench that it joins."""
    for name in vars(args).keys() - {"join", "api_key", "command", "run"}:
        if getattr(args, name) != command.get_default(name):
            command.error(
                f"argument --join: takes nothing but --api-key beside it, not {name.replace('_', '-')}"
            )


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"must be of the form HOST:PORT, not {text!r}")
    return host, int(port)


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)
