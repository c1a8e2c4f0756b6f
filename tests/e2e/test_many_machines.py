"""Load from more than one machine: what is merged is exactly what each has sent."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from loadtest.records import RequestRecord, read_records
from serving.engines.launch import free_port
from tests.network import ADDRESSES, two_machines
from tests.processes import write_config

RIGSERVE = [sys.executable, "-m", "serving"]


def test_a_bench_from_two_machines_is_the_union_of_what_they_sent(
    tmp_path: Path, cache_dir: Path
) -> None:
    config = write_config(tmp_path, cache_dir)
    content = yaml.safe_load(config.read_text())
    content["server"]["host"] = "0.0.0.0"  # noqa: S104 - there is nobody else in its network
    config.write_text(yaml.safe_dump(content))
    # The other machine's key is its own, so the ledger tells who has sent what.
    near, far = (_key(config, name) for name in ("near", "far"))
    bind, out = f"{ADDRESSES[0]}:{free_port()}", tmp_path / "report"
    with two_machines() as (here, there):
        worker = subprocess.Popen(
            [*there, *RIGSERVE, "bench", "--join", bind], env=os.environ | {"OPENAI_API_KEY": far}
        )
        try:
            bench = subprocess.run(
                [*here, sys.executable, "-m", "tests.two_machines", str(config), str(out), bind],
                env=os.environ | {"OPENAI_API_KEY": near},
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert bench.returncode == 0, bench.stdout + bench.stderr
            assert worker.wait(60) == 0, "it ends with the bench"
        finally:
            worker.kill()
            worker.wait()

    records = read_records(out / "records.jsonl")
    # Before the load the machine with the bench asks a few things by itself.
    load = [record for record in records if not record.warmup]
    assert {record.worker for record in load} == {0, 1}
    assert len({record.number for record in load}) == len(load)
    sent: dict[int, list[RequestRecord]] = defaultdict(list)
    for record in load:
        sent[record.worker].append(record)
    booked = _booked_by_key(config)
    asked_first = [record for record in records if record.warmup]
    shares = [(len(one), _tokens(one)) for one in sent.values()]
    extra = (len(asked_first), _tokens(asked_first))
    far_share = booked["far"]
    near_share = (booked["near"][0] - extra[0], booked["near"][1] - extra[1])
    assert sorted(shares) == sorted([far_share, near_share])

    report = json.loads((out / "report.json").read_text())
    assert report["totals"]["requests"] == len(load)
    assert report["totals"]["completion_tokens"] == _tokens(load)
    assert report["stages"][0]["client"]["processes"] == 2
    summary = report["stages"][0]["summary"]
    measured = [record for record in load if record.measured]
    assert {record.worker for record in measured} == {0, 1}
    for name in ("ttft_seconds", "tpot_seconds", "end_to_end_seconds"):
        values = [getattr(record, name) for record in measured]
        assert summary[name]["count"] == len(values)
        assert summary[name]["mean"] == pytest.approx(np.mean(values), abs=2e-6)
        for percent in (50, 90, 99):
            expected = np.percentile(values, percent)
            assert summary[name][f"p{percent}"] == pytest.approx(expected, abs=2e-6)


def _key(config: Path, name: str) -> str:
    made = subprocess.run(
        [*RIGSERVE, "keys", "create", name, "--config", str(config), "--json"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    secret: str = json.loads(made.stdout)["secret"]
    return secret


def _booked_by_key(config: Path) -> dict[str, tuple[int, int]]:
    """Requests and generated tokens of each key, as the ledger has them."""
    told = subprocess.run(
        [*RIGSERVE, "cost", "report", str(config), "--by", "key", "--format", "csv"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    rows = csv.DictReader(io.StringIO(told.stdout))
    return {row["key"]: (int(row["requests"]), int(row["completion_tokens"])) for row in rows}


def _tokens(records: list[RequestRecord]) -> int:
    return sum(record.completion_tokens or 0 for record in records)
