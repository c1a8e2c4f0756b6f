"""Every scenario that comes with rigserve, for a few requests each, against a whole server with a small model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from loadtest.records import RequestRecord, read_records
from loadtest.scenario import FOLDER, load_scenario, names
from tests.processes import RigServer, write_config

# As much as two cores have time for.
AT_ONCE = 3
RATE, USERS = "3", "2"
USERS_OF_ALL_TENANTS = {"mixed": "5"}


@pytest.fixture(scope="module")
def rig(
    tmp_path_factory: pytest.TempPathFactory, cache_dir: Path, small_path: Path
) -> Iterator[RigServer]:
    """With the context of the default config: documents and agents' histories are long."""
    small = {"source": str(small_path), "quantization": None}
    config = write_config(
        tmp_path_factory.mktemp("rig"),
        cache_dir,
        context_length=4096,
        queue_timeout_seconds=300,
        **small,
    )
    with RigServer(config) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def benches(
    rig: RigServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[subprocess.CompletedProcess[str], Path]]:
    """What became of each."""
    folder = tmp_path_factory.mktemp("benches")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(lambda name: run(name, rig, folder / name), names())
    return dict(zip(names(), done, strict=True))


def run(name: str, rig: RigServer, out: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    kind = load_scenario(name)[1].load.kind
    less: tuple[str, ...] = ()
    if kind == "closed":
        less = ("--users", USERS_OF_ALL_TENANTS.get(name, USERS))
    elif kind == "open":
        less = ("--rate", RATE)
    else:
        content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        content["load"] |= {"most": 2, "max_stages": 2}
        out.mkdir()
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content))
        name = str(file)
    bench = subprocess.run(
        [
            *(sys.executable, "-m", "serving", "bench", name, *less),
            *("--duration", "2s", "--output-tokens", "4", "--url", f"{rig.base_url}/v1"),
            *("--config", str(rig.config_path), "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return bench, out


@pytest.mark.parametrize("name", names())
def test_it_runs(
    name: str, benches: dict[str, tuple[subprocess.CompletedProcess[str], Path]]
) -> None:
    bench, out = benches[name]
    assert bench.returncode == 0, bench.stdout + bench.stderr
    report = json.loads((out / "report.json").read_text())
    # Benches run at once here, and each sees that the server has others.
    assert [note for note in report["notes"] if "requests of others" not in note] == []
    assert report["totals"]["errors"] == 0
    load = [record for record in read_records(out / "records.jsonl") if not record.warmup]
    scenario = load_scenario(name)[1]
    if scenario.load.kind != "open":
        assert {record.tenant for record in load} == {one.tenant for one in scenario.traffic}
    assert {record.completion_tokens for record in load} == {4}
    for record in load:
        as_long_as_wanted(record)
    assert report["cost"]["traffic"]["requests"] == len(load)
    tiers = {one.tenant: one.fields.get("service_tier", "default") for one in scenario.traffic}
    assert {(record.tenant, record.service_tier) for record in load} <= set(tiers.items())


def as_long_as_wanted(record: RequestRecord) -> None:
    """Not exactly: some words of code, which are counted by the hundred, are more tokens than others."""
    assert record.prompt_tokens is not None
    assert record.wanted_prompt_tokens is not None
    assert record.prompt_tokens >= 0.5 * record.wanted_prompt_tokens
