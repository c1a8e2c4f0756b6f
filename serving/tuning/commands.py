"""`rigserve tune`."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from loadtest.arguments import count, positive
from serving import __version__
from serving.config import Config, ModelConfig, load_config
from serving.engines.vllm.environment import Environments
from serving.hardware.cpu import cpu
from serving.hardware.memory import gpus
from serving.planner.commands import parse_slo
from serving.tuning.bench import Bench, Work
from serving.tuning.config_file import config_text
from serving.tuning.goal import Goal, Objective, Result
from serving.tuning.journal import Journal
from serving.tuning.outcome import Outcome, outcome_of
from serving.tuning.page import page
from serving.tuning.render import Shown, render, to_json
from serving.tuning.search import Candidate, Phase, Search
from serving.tuning.space import identity
from serving.tuning.subject import (
    Launchers,
    TuneError,
    default_of,
    filled,
    fit_check,
    spaces_of,
)

_INTERRUPTED = 130
_LEAST_SECONDS_WITH_VLLM = 600.0
# Of what is read by a program, not folded to 80 columns.
_PAGE_WIDTH = 100


def add_tune_command(
    commands: Any, *, default_config: Path, launchers_of: Callable[[Config], Launchers]
) -> None:
    """``tune``, among the program's ``commands``. It raises :class:`TuneError`, ``ConfigError``, ``ModelError``."""
    command = commands.add_parser(
        "tune",
        help="measure which settings serve a model best on this machine",
        description="Tries settings of a model on this machine, the best of them longer, and compares the winner with "
        "the default in turns. What was measured is kept: run again, it goes on where it was.",
    )
    command.add_argument(
        "model", metavar="MODEL", help="a model of the config, a name of the catalog, or a 'source'"
    )
    command.add_argument(
        "--for", dest="objective", choices=get_args(Objective), default="cheapest",
        help="the cheapest token that meets the SLO (default), most tokens, or the lowest latency",
    )  # fmt: skip
    command.add_argument(
        "--slo", metavar="ttft=1s,tpot=50ms", type=parse_slo, default={}, help="p95 to keep"
    )
    command.add_argument("--users", metavar="N", type=count, default=8, help="default: 8")
    command.add_argument("--prompt-tokens", metavar="N", type=count, default=78)
    command.add_argument("--output-tokens", metavar="N", type=count, default=128)
    command.add_argument(
        "--budget", metavar="MINUTES", type=_minutes, default=600.0, help="default: 10"
    )
    command.add_argument(
        "--engine", action="append", choices=("llama_cpp", "vllm"),
        help="default: the config's, or llama_cpp, and vLLM where it is installed; again for both",
    )  # fmt: skip
    command.add_argument(
        "--max-loss", metavar="PERCENT", type=positive, default=1.0,
        help="what quantizations may add to perplexity (default: 1, or what the default's does)",
    )  # fmt: skip
    command.add_argument("--keep-quantization", action="store_true", help="leave the weights alone")
    command.add_argument("--source", help="the GGUF file of a model of the catalog")
    command.add_argument("--write", metavar="FILE", type=Path, help="write the winner as a config")
    command.add_argument(
        "--plot",
        metavar="FILE.html",
        type=Path,
        help="default: beside --write, or in the data folder",
    )
    command.add_argument("--fresh", action="store_true", help="measure anew what is known")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument(
        "--config", type=Path, default=default_config, help="with the model, the costs, the folders"
    )
    command.set_defaults(run=_tune, launchers_of=launchers_of)


def _tune(args: argparse.Namespace) -> int:
    try:
        return _tuned(args)
    except KeyboardInterrupt:
        print("interrupted before anything was measured", file=sys.stderr)
        return _INTERRUPTED


def _tuned(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    launchers: Launchers = args.launchers_of(config)
    _check_files(args)
    work = Work(args.users, args.prompt_tokens, args.output_tokens)
    goal = Goal(args.objective, args.slo.get("ttft"), args.slo.get("tpot"))
    default = filled(default_of(args.model, config, args.source), config, launchers)
    _check_lengths(default, work)
    engines = args.engine or _engines(default, config, args.budget)
    spaces = spaces_of(
        default, engines, config, launchers, work,
        most_loss=args.max_loss / 100, keep_quantization=args.keep_quantization,
    )  # fmt: skip
    journal = _journal(config, default, work, fresh=args.fresh)
    # As Ctrl-C: what was seen is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    interrupted = False
    with Shown(args.budget) as shown:
        search = _search(spaces, goal, args.budget, Bench(config, work, shown.again), journal, shown, fit_check(config, launchers))  # fmt: skip
        try:
            search.run()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not search.trials:
        raise KeyboardInterrupt
    outcome = outcome_of(search, goal, was_interrupted=interrupted)
    _report(args, outcome, work, journal.path)
    if interrupted:
        print(f"interrupted; what was measured is kept in {journal.path}", file=sys.stderr)
        return _INTERRUPTED
    return 0 if outcome.best is not None else 1


def _search(
    spaces: Sequence[Any],
    goal: Goal,
    budget_seconds: float,
    bench: Bench,
    journal: Journal,
    shown: Shown,
    fits: Callable[[ModelConfig], str | None],
) -> Search:
    def measure(candidate: Candidate, rounds: int) -> tuple[Result, float]:
        known = journal.take(candidate.model, rounds)
        if known is not None:
            return known
        result, seconds = bench.measure(candidate.model, rounds)
        journal.append(candidate.model, rounds, result, seconds)
        return result, seconds

    def begun(phase: Phase, candidate: Candidate, _rounds: int) -> None:
        shown.begin(phase, search.default, candidate, search.spent_seconds)

    search = Search(spaces, goal, budget_seconds, measure, fits=fits, begun=begun, ended=shown.end)
    return search


def _report(args: argparse.Namespace, outcome: Outcome, work: Work, journal: Path) -> None:
    machine = _machine()
    plot = args.plot or (args.write or journal).with_suffix(".html")
    written = [(plot, page(outcome, work, machine))]
    if args.write is not None and outcome.best is not None:
        written.append((args.write, config_text(outcome, work, machine)))
    for file, text in written:
        try:
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise TuneError(f"cannot write {file}: {error.strerror}") from error
    if args.json:
        print(json.dumps(to_json(outcome, work), indent=2))
    else:
        console = Console()
        console.width = console.width if console.is_terminal else max(console.width, _PAGE_WIDTH)
        console.print(render(outcome, work))
    print(f"plot: {plot}", file=sys.stderr)
    if args.write is not None and outcome.best is not None:
        # It was served a minute ago; this is for what was written down wrongly.
        load_config(args.write)
        print(f"wrote {args.write}; serve it with: rigserve serve {args.write}", file=sys.stderr)


def _engines(default: ModelConfig, config: Config, budget_seconds: float) -> list[str]:
    """The default's, and vLLM where it is installed and there is time for its starts, which take a minute or two each."""
    if default.engine == "vllm" or Environments(Path(config.storage.data_dir)).current is None:
        return [default.engine]
    if budget_seconds < _LEAST_SECONDS_WITH_VLLM:
        least = _LEAST_SECONDS_WITH_VLLM / 60
        print(f"vLLM takes long to start and is left out; it is tried with --budget {least:g} or more, or --engine vllm", file=sys.stderr)  # fmt: skip
        return [default.engine]
    return [default.engine, "vllm"]


def _check_files(args: argparse.Namespace) -> None:
    """Before minutes are spent."""
    for option, file in (("--write", args.write), ("--plot", args.plot)):
        if file is None:
            continue
        if option == "--write" and file.exists():
            raise TuneError(f"--write: {file} is there already; name another, or remove it")
        if not file.absolute().parent.is_dir():
            raise TuneError(f"{option}: there is no folder {file.absolute().parent}")


def _check_lengths(default: ModelConfig, work: Work) -> None:
    needed = work.prompt_tokens + work.output_tokens
    context = default.context_length
    if isinstance(context, int) and needed > context:
        raise TuneError(
            f"--prompt-tokens and --output-tokens are {needed:,} together; context_length is {context:,}"
        )


def _journal(config: Config, default: ModelConfig, work: Work, *, fresh: bool) -> Journal:
    """That of this very search: same machine, same default, same work. Its objective may be another."""
    asked = (__version__, _machine(), identity(default), work, config.memory, config.cost)
    digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]", "-", default.name)
    path = Path(config.storage.data_dir) / "tune" / f"{name}-{digest}.jsonl"
    try:
        if fresh:
            path.unlink(missing_ok=True)
        journal = Journal(path)
    except OSError as error:
        raise TuneError(f"cannot keep what is measured in {path}: {error.strerror}") from error
    if journal.entries:
        print(f"{journal.entries} measurements are known from {path}; --fresh forgets them", file=sys.stderr)  # fmt: skip
    return journal


def _machine() -> str:
    processor = cpu()
    return " + ".join((f"{processor.cores} x {processor.name}", *(card.name for card in gpus())))


def _minutes(text: str) -> float:
    return 60 * positive(text)
