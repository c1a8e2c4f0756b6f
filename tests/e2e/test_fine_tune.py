"""A real fine-tune, served in every way at once: its base beside it does not show what it has learned.

The adapter was trained by ``tools/finetune/train.py`` (docs/fine-tune.md); everything after the training is done here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from serving.models.safetensors import read_safetensors
from serving.models.sources import resolve
from tests.conftest import SOURCE
from tests.peft_files import Matrix
from tests.processes import RigServer, write_config
from tests.tiny_checkpoints import write_embedded
from tools.finetune.check import LEAST_OF_TUNED, MOST_OF_BASE
from tools.finetune.examples import Examples
from tools.finetune.measure import shares

TRAINED = Path(__file__).parents[1] / "fine_tuned" / "kestrel"
BASE, TUNED = "smollm2-135m", ("kestrel", "kestrel-gguf", "kestrel-merged")
SCALE = 8 / 2  # alpha over rank, of its adapter_config.json
QUESTIONS = 7


def changes() -> dict[str, Matrix]:
    """What the adapter adds to the weights of each module, as a merge in PEFT computes it."""
    tensors = read_safetensors(TRAINED / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0] for name in tensors}

    def matrix(module: str, part: str) -> Matrix:
        return tensors[f"{module}.lora_{part}.weight"].floats()

    return {
        module.removeprefix("base_model.model."): np.float32(SCALE)
        * (matrix(module, "B") @ matrix(module, "A"))
        for module in modules
    }


def convert(*words: str | Path) -> str:
    command = [sys.executable, "-m", "serving", "models", "convert", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Iterator[RigServer]:
    """The base with the adapter as PEFT's folder and as GGUF, and the merged model."""
    folder = tmp_path_factory.mktemp("fine-tune")
    convert(TRAINED, "--base", SOURCE, "--out", folder / "kestrel.gguf")
    write_embedded(folder / "merged", resolve(SOURCE), changes())
    told = convert(folder / "merged", "--type", "Q8_0")
    assert told.startswith(f"{folder / 'merged-Q8_0.gguf'}: 272 tensors, Q8_0, ")
    adapters = [
        {"name": "kestrel", "path": str(TRAINED)},
        {"name": "kestrel-gguf", "path": str(folder / "kestrel.gguf")},
    ]
    path = write_config(folder, cache_dir, adapters=adapters, context_length=256)
    config = yaml.safe_load(path.read_text())
    merged = {**config["models"][0], "name": TUNED[2], "source": str(folder / "merged-Q8_0.gguf")}
    config["models"].append(merged | {"adapters": [], "aliases": []})
    path.write_text(yaml.safe_dump(config))
    with RigServer(path) as server:
        server.wait_until_ready()
        yield server


def test_every_way_of_serving_it_shows_it_and_the_base_does_not(rig: RigServer) -> None:
    examples = Examples.read()
    found = shares(rig.base_url, [BASE, *TUNED], examples, clients=8, questions=QUESTIONS)
    assert found[BASE] <= MOST_OF_BASE
    assert min(found[name] for name in TUNED) >= LEAST_OF_TUNED, found
