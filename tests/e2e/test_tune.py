"""`rigserve tune` on this machine: interrupted, taken up again, and written as a config."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.config import load_config
from tests.processes import Program, write_config


def command(config: Path, folder: Path) -> list[str]:
    """With as little time as there can be: each measurement is a server that starts."""
    words = f"tune smollm2-135m --config {config} --budget 0.01 --users 2 --for throughput"
    words += " --prompt-tokens 20 --output-tokens 8 --keep-quantization"
    return [sys.executable, "-m", "serving", *words.split(), "--write", str(folder / "best.yaml")]


@pytest.mark.timeout(600)
def test_it_goes_on_where_it_was_interrupted(tmp_path: Path, cache_dir: Path) -> None:
    config = write_config(tmp_path, cache_dir, context_length=256, prefix_cache_mib=0)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    with Program(command(config, cut), "", {}) as tune:
        tune.wait_for_output("\n2 trying: ", 180)
        assert tune.stop(signal.SIGINT, 60) == 130
    assert "1 trying: the default\n" in tune.output
    assert "interrupted; what was measured is kept in" in tune.output
    assert "Nothing else was tried" in tune.output
    # The best so far is the default.
    [written] = load_config(cut / "best.yaml").local_models
    assert written == load_config(config).local_models[0]
    assert (cut / "best.html").exists()

    ended = subprocess.run(
        [*command(config, whole), "--json"], capture_output=True, text=True, timeout=400, check=False
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "1 measurements are known from" in ended.stderr
    report = json.loads(ended.stdout)
    default, *others = report["trials"]
    assert default["is_default"]
    assert default["measured"]["requests"] == 2
    compared = [trial for trial in others if trial["phase"] == "compare"]
    assert len(compared) >= 6
    assert sum(trial["is_default"] for trial in compared) == len(compared) / 2
    assert any(not trial["is_default"] for trial in others)
    [best] = load_config(whole / "best.yaml").local_models
    assert best.model_dump(mode="json", exclude_defaults=True) == report["best"]
    assert report["reason"] in (whole / "best.yaml").read_text()
    assert "</html>" in (whole / "best.html").read_text()


def test_what_it_cannot_do_is_said_before_minutes_are_spent(
    tmp_path: Path, cache_dir: Path
) -> None:
    config = write_config(tmp_path, cache_dir)
    (tmp_path / "there.yaml").write_text("models: []\n")
    for more, said in (
        (["--write", str(tmp_path / "there.yaml")], "there.yaml is there already"),
        (["--output-tokens", "600"], "are 678 together; context_length is 512"),
        (["--slo", "speed=1s"], "is not of the form ttft=1s or tpot=50ms"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "serving", "tune", "smollm2-135m", "--config", str(config), *more],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 2
        assert said in ended.stderr
