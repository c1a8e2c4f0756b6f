"""The default config beside the one that `rigserve tune` finds here: the same prompts, in turns, each server alone.

python -m loadtest.benchmarks.tune --budget 5 --pairs 6

"""

from __future__ import annotations

import argparse
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from loadtest.benchmarks.engine.table import processor
from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.results import publish
from loadtest.measures import Summary
from loadtest.waves import Waves, run_waves
from serving.config import load_config

_DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"
_MODEL = "smollm2-135m"
_WAVES = Waves(users=8, rounds=3, prompt_tokens=78, output_tokens=128)
_WANTED = 1.3


def tuned(budget_minutes: float, file: Path, objective: str) -> None:
    """Have the command write what it finds; raises ``CalledProcessError``."""
    command = f"tune {_MODEL} --users {_WAVES.users} --budget {budget_minutes:g} --for {objective}"
    command += (
        f" --prompt-tokens {_WAVES.prompt_tokens} --output-tokens {_WAVES.output_tokens} --fresh"
    )
    subprocess.run(
        [sys.executable, "-m", "serving", *command.split(), "--write", str(file)], check=True
    )


def measured(model: dict[str, Any], folder: Path, seed: int) -> Summary:
    """What the users of a server with this model saw; it ends with the measurement."""
    default, port = load_config(_DEFAULT_CONFIG), free_port()
    config = {
        "server": {"port": port},
        "models": [model],
        "storage": {"cache_dir": default.storage.cache_dir, "data_dir": str(folder / "data")},
    }
    file = folder / "rig.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "serving", "serve", str(file)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/ready"):
        waves = Waves(_WAVES.users, _WAVES.rounds, _WAVES.prompt_tokens, _WAVES.output_tokens, seed)
        return run_waves(f"{url}/v1", str(model["name"]), waves, default.cost).summary


def measure(args: argparse.Namespace) -> str:
    """Tune, compare; Markdown."""
    found: dict[str, list[Summary]] = {"default": [], "tuned": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        winner = args.winner or folder / "winner.yaml"
        if args.winner is None:
            tuned(args.budget, winner, args.objective)
        models = {"default": _model(_DEFAULT_CONFIG), "tuned": _model(winner)}
        for pair in range(args.pairs):
            order = list(models) if pair % 2 == 0 else list(models)[::-1]
            for which in order:
                summary = measured(models[which], folder, pair)
                found[which].append(summary)
                rate = summary.completion_tokens_per_second or 0.0
                print(f"pair {pair + 1}, {which}: {rate:.0f} tok/s", file=sys.stderr, flush=True)
    return _markdown(args, models, found)


def _model(file: Path) -> dict[str, Any]:
    """The model of a config, in JSON's words: what is not as it is by default."""
    model = next(each for each in load_config(file).local_models if each.name == _MODEL)
    told: dict[str, Any] = model.model_dump(mode="json", exclude_defaults=True)
    return {"name": model.name, "engine": model.engine, **told}


def _markdown(
    args: argparse.Namespace, models: dict[str, dict[str, Any]], found: dict[str, list[Summary]]
) -> str:
    keys = sorted(models["default"].keys() | models["tuned"].keys())
    changed = [
        f"`{key}: {models['tuned'].get(key, 'as by default')}`"
        for key in keys
        if models["default"].get(key) != models["tuned"].get(key)
    ]
    rows = []
    for number, label in enumerate(("tok/s, all users", "TTFT p50, ms", "TPOT p50, ms")):
        ours, theirs = ([_figures(each)[number] for each in found[name]] for name in found)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            f"| {label} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} | "
            f"**{statistics.median(ratios):.2f}** | {', '.join(f'{each:.2f}' for each in ratios)} |"
        )
    return "\n".join(
        [
            f"\n## {date.today()}: {processor()}\n",
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; {_MODEL}, {_WAVES.users} users, "
            f"{_WAVES.rounds} requests of each, {_WAVES.prompt_tokens} prompt tokens, {_WAVES.output_tokens} generated; medians of "
            f"{args.pairs} pairs in turns. Wanted: tok/s ≥ {_WANTED} times the default's.\n",
            f"Command: `python -m loadtest.benchmarks.tune {shlex.join(_shown(sys.argv[1:]))}`\n",
            f"Tuned, for {args.objective}: {', '.join(changed) or 'nothing; the default is best'}\n",
            "|  | default | tuned | tuned ÷ default | of each pair |",
            "|---|--:|--:|--:|--:|",
            *rows,
            "",
        ]
    )


def _figures(summary: Summary) -> tuple[float, float, float]:
    """Tokens per second of all users, and medians of TTFT and TPOT in milliseconds."""
    rate, ttft, tpot = (
        summary.completion_tokens_per_second,
        summary.ttft_seconds,
        summary.tpot_seconds,
    )
    assert rate is not None
    assert ttft is not None
    assert tpot is not None
    return rate, ttft.p50 * 1e3, tpot.p50 * 1e3


def _shown(words: Sequence[str]) -> list[str]:
    """The command without places of this machine."""
    return [word for word in words if "/" not in word and word not in ("--out", "--winner")]


def main() -> int:
    """Measure, print Markdown, append it to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=5, help="minutes of tuning")
    parser.add_argument("--for", dest="objective", default="throughput", help="as of rigserve tune")
    parser.add_argument("--pairs", type=int, default=6, help="measurements of each")
    parser.add_argument("--winner", type=Path, help="a config instead of tuning")
    parser.add_argument("--out", type=Path, help="append the table to this file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the servers then, too
    report = measure(args)
    publish(report, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
