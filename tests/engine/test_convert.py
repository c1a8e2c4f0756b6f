"""`rigserve models convert`: an adapter does in llama.cpp what it does in Hugging Face's arithmetic, and is served."""

from __future__ import annotations

import math
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.llamacpp.measure import log_softmax
from serving.llamacpp.runtime import Context, LoraAdapter, Model
from serving.models.peft import convert_adapter
from tests.peft_files import MODULES, Llama, Matrix, write_peft
from tests.processes import EngineServer

PROMPT = "The capital of France is Paris, and the capital of Spain is"
LAYERS = 2
# The KV cache is rounded to 16 bits.
TOLERANCE = 0.02

Pairs = dict[str, tuple[Matrix, Matrix]]


@pytest.fixture(scope="module")
def base(small_whole_path: Path) -> Path:
    """The model's first layers, as F32."""
    return small_whole_path


@pytest.fixture(scope="module")
def llama(base: Path) -> Llama:
    return Llama(base)


def random_pairs(llama: Llama, layers: range, ranks: dict[str, int]) -> Pairs:
    random = np.random.default_rng(3)
    pairs = {}
    for layer in layers:
        for kind in MODULES:
            module = f"model.layers.{layer}.{kind}"
            rows, columns = llama.shape(module)
            rank = ranks.get(kind, 4)
            # As BF16 has them, so that no file rounds them.
            a, b = (
                (random.normal(0, deviation, shape).astype("<f4").view("<u4") & 0xFFFF0000).view(
                    "<f4"
                )
                for deviation, shape in (
                    (columns**-0.5, (rank, columns)),
                    (0.1, (rows, rank)),
                )
            )
            pairs[module] = a, b
    return pairs


@pytest.mark.parametrize(
    ("dtype", "ranks", "config", "scales"),
    [
        ("F32", {}, {}, {}),
        ("BF16", {}, {"use_rslora": True}, dict.fromkeys(MODULES, 8 / math.sqrt(4))),
        (
            "F32",
            {"self_attn.q_proj": 2},
            {
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 0},
            },
            {"self_attn.q_proj": 1.5, "1.mlp.up_proj": 0.0},
        ),
    ],
)
def test_an_adapter_does_what_it_does_in_transformers(
    dtype: str,
    ranks: dict[str, int],
    config: dict[str, Any],
    scales: dict[str, float],
    base: Path,
    llama: Llama,
    tmp_path: Path,
) -> None:
    pairs = random_pairs(llama, range(LAYERS), ranks)
    folder = write_peft(tmp_path / "tuned", pairs, dtype=dtype, **config)
    assert convert_adapter(folder, base, tmp_path / "tuned.gguf") == LAYERS * len(MODULES)

    def scale(module: str) -> float:
        layer, kind = module.removeprefix("model.layers.").split(".", 1)
        return scales.get(f"{layer}.{kind}", scales.get(kind, 2.0))

    lora = {module: (*pair, scale(module)) for module, pair in pairs.items()}
    with closing(Model(base, 0)) as model:
        tokens = model.tokenize(PROMPT, add_special=True, parse_special=False)
        rows = len(tokens)
        context = Context(model, slots=1, context_length=64, batch_tokens=64, threads=1)
        with closing(context):
            found = []
            for adapter in (None, LoraAdapter(model, tmp_path / "tuned.gguf", 1.0)):
                context.use_adapter(adapter)
                context.truncate(0, 0)
                outputs = [False] * (rows - 1) + [True]
                context.decode(tokens, range(rows), [0] * rows, outputs)
                found.append(log_softmax(context.logits(rows - 1)))
    plain, tuned = (
        log_softmax(llama.logits(tokens, each).astype(np.float32)) for each in ({}, lora)
    )
    assert np.abs(tuned - plain).max() > 50 * TOLERANCE
    assert np.abs(found[0] - plain).max() < TOLERANCE
    assert np.abs(found[1] - tuned).max() < TOLERANCE


def test_a_converted_adapter_is_served_beside_its_base(
    model_path: Path, llama: Llama, tmp_path: Path
) -> None:
    folder = write_peft(tmp_path / "tuned", random_pairs(llama, range(LAYERS), {}), lora_alpha=80)
    done = subprocess.run(
        [sys.executable, "-m", "serving", "models", "convert", str(folder), "--base", str(model_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    path = tmp_path / "tuned.gguf"
    assert done.stdout == f"{path}: changes 14 matrices of the base model\n"
    options: dict[str, Any] = {"context_length": 256, "max_sequences": 2}
    with EngineServer(model_path, adapter=f"tuned={path}", **options) as server:
        texts = [
            server.client.completions.create(
                model=model, prompt=PROMPT, max_tokens=12, temperature=0
            )
            .choices[0]
            .text
            for model in ("smol", "tuned")
        ]
    assert texts[0] != texts[1]
