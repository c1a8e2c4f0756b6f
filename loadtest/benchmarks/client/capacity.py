"""How many streamed tokens a second and how many streams at once the client takes in, and how true its clock stays.

    python -m loadtest.benchmarks.client.capacity --out docs/results/load.md

The engine computes nothing, and writes one chunk to each stream in every turn, so what the client should
find is known: an inter-token latency of one turn. Engine and client have a core each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from loadtest.benchmarks.client.benches import bench
from loadtest.benchmarks.engine.table import processor
from loadtest.benchmarks.gateway.servers import Cores
from loadtest.benchmarks.processes import free_port, running
from loadtest.benchmarks.results import publish

_MS = 1e3


@dataclass(frozen=True, slots=True)
class Case:
    """So many streams, one token each every so many seconds, into so many processes (0: one, by itself)."""

    streams: int
    turn_seconds: float
    workers: int

    @property
    def offered(self) -> float:
        """Tokens per second in all."""
        return self.streams / self.turn_seconds


_CASES = (
    Case(500, 0.05, 0),
    Case(500, 0.025, 0),
    Case(1000, 0.05, 0),
    Case(1000, 0.05, 2),
)


def main() -> int:
    """Measure, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each case")
    parser.add_argument("--out", type=Path, help="also append the table to this file")
    args = parser.parse_args()
    cores = Cores.of_this_machine()
    cores.pin_me()
    rows = [_row(case, cores, args.seconds) for case in _CASES]
    header = (
        "streams", "processes", "offered tok/s", "read tok/s", "true ITL (ms)", "ITL p50 (ms)", "ITL p99 (ms)",
        "TPOT p50 (ms)", "client CPU", "loop lag (ms)", "marked",
    )  # fmt: skip
    lines = [header, tuple("---" for _ in header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = (
        f"\n## {date.today()}: what the client takes in\n\n{processor()}; the engine, which computes nothing, has "
        "one core, all client processes the other.\n\n"
        f"Command: `python -m loadtest.benchmarks.client.capacity --seconds {args.seconds:g}`\n\n{table}\n"
    )
    publish(text, args.out)
    return 0


def _row(case: Case, cores: Cores, seconds: float) -> tuple[str, ...]:
    port = free_port()
    module = "loadtest.benchmarks.gateway.engine"
    engine = [sys.executable, "-m", module, str(port), "-", str(case.turn_seconds)]
    # Answers of two to six seconds, so that streams do not all end in the same moment.
    lengths = {"kind": "uniform", "min": 2 / case.turn_seconds, "max": 6 / case.turn_seconds}
    load = {"kind": "closed", "users": case.streams}
    scenario = {"load": load, "traffic": [{"output_tokens": lengths}], "warm_up": 0.3}
    with (
        running(cores.pinned(engine), f"http://127.0.0.1:{port}/ready"),
        tempfile.TemporaryDirectory() as folder,
    ):
        file = Path(folder) / "streams.yaml"
        file.write_text(json.dumps(scenario))
        report = bench(
            Path(folder) / "bench", f"http://127.0.0.1:{port}/v1", str(file), "--model", "fake-0",
            "--duration", f"{seconds:g}s",
            "--workers", str(case.workers),
        )  # fmt: skip
    stage = report["stages"][0]
    return _figures(case, stage["summary"], stage["client"])


def _figures(case: Case, summary: dict[str, Any], client: dict[str, Any]) -> tuple[str, ...]:
    itl, tpot = summary["itl_seconds"], summary["tpot_seconds"]
    return (
        str(case.streams),
        str(case.workers or 1),
        f"{case.offered:,.0f}",
        f"{summary['completion_tokens_per_second']:,.0f}",
        f"{case.turn_seconds * _MS:.1f}",
        f"{itl['p50'] * _MS:.2f}",
        f"{itl['p99'] * _MS:.1f}",
        f"{tpot['p50'] * _MS:.2f}",
        f"{client['cpu_share']:.0%}",
        f"{client['lag_mean_seconds'] * _MS:.2f}",
        "; ".join(client["limits"]) or "no",
    )


if __name__ == "__main__":
    sys.exit(main())
