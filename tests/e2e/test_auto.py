"""`auto` at the start of a server: the numbers are shown, and what they take stays within the budget."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from serving.hardware.memory import family_of, resident_mib
from tests.processes import RigServer, write_config

BUDGET_MIB = 500


def test_all_slots_full_stay_within_the_budget(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(
        tmp_path, cache_dir, context_length="auto", max_sequences=2, prefix_cache_mib=0
    )
    config = yaml.safe_load(path.read_text()) | {"memory": {"budget_mib": BUDGET_MIB}}
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as rig:
        rig.wait_until_ready()
        found = re.search(r"smollm2-135m: context_length: (\d+) \(auto\)", rig.output)
        assert found is not None, rig.output
        context_length = int(found[1])
        assert context_length == 2048  # of 8,192 that it was trained for
        prompt = "sea " * (context_length - 100)

        def ask(number: int) -> int:
            answer = rig.client.completions.create(
                model="smollm2-135m", prompt=f"{number} {prompt}", max_tokens=2
            )
            assert answer.usage is not None
            return answer.usage.prompt_tokens

        with ThreadPoolExecutor(2) as pool:
            assert min(pool.map(ask, range(2))) > 0.9 * (context_length - 100)
        engines = [pid for pid in family_of(rig.process.pid) if pid != rig.process.pid]
        assert resident_mib(engines) <= BUDGET_MIB


def test_a_config_that_cannot_fit_ends_at_once(tmp_path: Path, cache_dir: Path) -> None:
    path = write_config(tmp_path, cache_dir, context_length="auto")
    config = yaml.safe_load(path.read_text()) | {"memory": {"budget_mib": 150}}
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as rig:
        assert rig.process.wait(60) == 2
    assert "smollm2-135m does not fit: it needs" in rig.output
    assert "main memory: 150 MiB" in rig.output
