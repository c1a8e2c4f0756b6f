"""A year of ten million requests in the ledger: how long it takes to write, to take on from an older format, to report.

    python -m loadtest.benchmarks.ledger --requests 10000000

Requests are spread over a year by a daily rhythm, over 12 tenants, 40 keys, 3 models and 2 adapters, with prompts from
a handful to hundreds of thousands of tokens, a tenth of them in batches. Reports are those of the command line, in
processes of their own, beside the default config's commercial models. Sums of the roll-up are checked against the
requests'. Takes some 4 GB in --folder (removed at the end) and minutes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import shlex
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from datetime import date
from pathlib import Path

import numpy as np
import yaml

from loadtest.benchmarks.engine.table import processor
from serving.config import load_config
from serving.cost import rollup
from serving.cost.ledger import Ledger, UsageRecord

_DAYS, _DAY_SECONDS = 365, 86_400
_BATCH = 50_000
_MODELS = (("small", "-"), ("large", "-"), ("coder", "-"), ("sql", "large"), ("support", "large"))
_DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"
_REPORTS = (
    ("report", "--by", "tenant"),
    ("report", "--by", "key"),
    ("report", "--by", "adapter"),
    ("report", "--by", "day"),
    ("report", "--by", "tenant", "--since", "30d"),
    ("verdict",),
)
_COLUMNS = [field.name for field in fields(UsageRecord)]
_INSERT = "INSERT INTO usage ({}, uid) VALUES ({}, ?) ON CONFLICT (uid) DO NOTHING".format(
    ", ".join(_COLUMNS), ", ".join("?" for _ in _COLUMNS)
)
_WANTED_SECONDS = 5.0
# What all requests have in common.
_REQUEST = UsageRecord(
    started_at=0.0, request_id="", user="-", model="", engine="llama_cpp",
    endpoint="/v1/chat/completions", status=200, streamed=True, prompt_tokens=0, cached_tokens=0,
    completion_tokens=0, tokens_source="engine", queue_seconds=0.01, prefill_seconds=0.0,
    decode_seconds=0.0, prefill_busy_seconds=0.0, decode_busy_seconds=0.0, timing_source="engine",
    energy_joules=0.0, energy_source="nvml", energy_usd=0.0, idle_usd=0.0, hardware_usd=0.0,
)  # fmt: skip


def _records(first: int, count: int, total: int, begin: float) -> Iterator[tuple[object, ...]]:
    """The year's requests number ``first`` and after, in order of time."""
    chance = np.random.default_rng(first)
    at = np.sort((first + count * chance.random(count)) / total) * _DAYS
    day = np.floor(at)
    # More by day than by night, and never so late that order is lost.
    hour = at - day
    seconds = begin + (day + hour - np.sin(2 * math.pi * hour) / 8 / math.pi) * _DAY_SECONDS
    prompt = np.minimum(chance.lognormal(6.5, 1.5, count), 400_000).astype(int)
    completion = chance.lognormal(5, 1, count).astype(int)
    keys = chance.integers(0, 40, count).tolist()
    models = [_MODELS[number] for number in chance.integers(0, len(_MODELS), count).tolist()]
    decode_seconds = completion / 400
    varying = {
        "started_at": seconds.tolist(),
        "request_id": [f"chatcmpl-{number:024x}" for number in range(first, first + count)],
        "model": [model for model, _ in models],
        "base_model": [base_model for _, base_model in models],
        "prompt_tokens": prompt.tolist(),
        "cached_tokens": (prompt // 3).tolist(),
        "completion_tokens": completion.tolist(),
        "prefill_seconds": (prompt / 4e3).tolist(),
        "decode_seconds": (4 * decode_seconds).tolist(),
        "prefill_busy_seconds": (prompt / 4e3).tolist(),
        "decode_busy_seconds": decode_seconds.tolist(),
        "energy_joules": (300 * decode_seconds).tolist(),
        "idle_joules": (30 * decode_seconds).tolist(),
        "energy_usd": (2.5e-5 * decode_seconds).tolist(),
        "idle_usd": (2e-6 * decode_seconds).tolist(),
        "hardware_usd": (3e-5 * decode_seconds).tolist(),
        "key_id": [f"key_{key:08x}" for key in keys],
        "tenant": [f"tenant-{key % 12}" for key in keys],
        "service_tier": np.where(chance.random(count) < 0.1, "batch", "default").tolist(),
    }
    columns = (varying.get(name, itertools.repeat(getattr(_REQUEST, name))) for name in _COLUMNS)
    uids = (f"bench-{number}" for number in range(first, first + count))
    return zip(*columns, uids, strict=False)


def _write(path: Path, total: int, begin: float) -> float:
    """The rows with the statement of the ledger's writer, in its format, trigger included; gives rows per second in it."""
    Ledger(path).close()
    writing_seconds = 0.0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=NORMAL")
        for first in range(0, total, _BATCH):
            rows = list(_records(first, min(_BATCH, total - first), total, begin))
            started = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_INSERT, rows)
            connection.execute("COMMIT")
            writing_seconds += time.perf_counter() - started
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return total / writing_seconds


def _check(path: Path) -> None:
    """The roll-up has what the requests add up to; raises ``AssertionError``."""
    with closing(sqlite3.connect(path)) as connection:
        tokens = "sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens)"
        rolled = connection.execute(
            f"SELECT sum(requests), {tokens} FROM {rollup.TABLE}"
        ).fetchone()
        single = connection.execute(f"SELECT count(*), {tokens} FROM usage").fetchone()
    assert rolled == single, (rolled, single)


def _rolled_up_again(path: Path) -> float:
    """Seconds to roll up what is there, as when a ledger of an older format is taken on."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        started = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"DROP TABLE {rollup.TABLE}")
        connection.execute("DROP TRIGGER usage_rolled_up")
        for statement in (*rollup.CREATE, *rollup.FILL):
            connection.execute(statement)
        connection.execute("COMMIT")
        return time.perf_counter() - started


def _seconds(arguments: tuple[str, ...], config: Path, rounds: int) -> list[float]:
    """How long a command takes from its start to its end."""
    command = [sys.executable, "-m", "serving", "cost", arguments[0], str(config), *arguments[1:]]
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return taken


def _config(folder: Path) -> Path:
    config = {
        "models": [{"name": "m", "engine": "remote", "base_url": "http://localhost/v1"}],
        "storage": {"data_dir": str(folder)},
        "cost": {"compare_to": list(load_config(_DEFAULT).cost.compare_to), "carbon_grams_per_kwh": 380},
    }  # fmt: skip
    path = folder / "rig.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def main() -> None:
    """Run the benchmark and print (and keep) its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3, help="of each report (default: 3)")
    parser.add_argument("--folder", type=Path, help="where the ledger is made (default: a new one)")
    parser.add_argument("--reuse", action="store_true", help="keep --folder's ledger, and use it")
    parser.add_argument("--out", type=Path, help="Markdown file to add the results to")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="rigserve-ledger-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        text = _measure(folder, args)
    finally:
        if not args.reuse:
            shutil.rmtree(folder)
    print(text)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}\n")


def _measure(folder: Path, args: argparse.Namespace) -> str:
    ledger = folder / "ledger.sqlite"
    begin = math.floor(time.time() / _DAY_SECONDS - _DAYS) * _DAY_SECONDS
    rows_per_second = None
    if not (args.reuse and ledger.exists()):
        rows_per_second = _write(ledger, args.requests, begin)
    _check(ledger)
    with closing(sqlite3.connect(ledger)) as connection:
        count = connection.execute("SELECT count(*) FROM usage").fetchone()[0]
        rolled = connection.execute(f"SELECT count(*) FROM {rollup.TABLE}").fetchone()[0]
    config = _config(folder)
    lines = [
        f"## {date.today()}: {processor()}",
        "",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, SQLite "
        f"{sqlite3.sqlite_version}; {count:,} requests, {rolled:,} rows of the roll-up, "
        f"{ledger.stat().st_size / 1e9:.1f} GB. Medians of {args.rounds}, whole commands, start of Python included.",
        "",
        f"Command: `{shlex.join(['python', '-m', 'loadtest.benchmarks.ledger', *_repeated(args)])}`",
        "",
        "| `rigserve cost` | seconds | slowest | wanted |",
        "|---|---:|---:|---|",
    ]
    for arguments in _REPORTS:
        taken = _seconds(arguments, config, args.rounds)
        median = statistics.median(taken)
        mark = "" if median < _WANTED_SECONDS else " (missed)"
        lines.append(
            f"| `{' '.join(arguments)}` | **{median:.2f}** | {max(taken):.2f} | < {_WANTED_SECONDS:g} s{mark} |"
        )
    lines.append("")
    if rows_per_second is not None:
        lines.append(f"Written at {rows_per_second:,.0f} rows/s, roll-up included.")
    lines.append(
        f"A ledger of the format before is rolled up in {_rolled_up_again(ledger):.0f} s, once."
    )
    _check(ledger)
    return "\n".join(lines)


def _repeated(args: argparse.Namespace) -> list[str]:
    return ["--requests", str(args.requests), "--rounds", str(args.rounds)]


if __name__ == "__main__":
    main()
