"""`rigserve models convert` of whole models: llama.cpp computes what transformers does."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from serving.llamacpp.measure import log_softmax
from serving.llamacpp.runtime import Context, Model
from serving.models.checkpoint import convert_checkpoint
from serving.models.gguf import read_header
from tests.tiny_checkpoints import (
    PROMPT,
    RECORDED,
    recorded,
    write_byte_tokenizer,
    write_space_tokenizer,
)

MODELS = list(json.loads((RECORDED / "models.json").read_bytes()))
OF_SENTENCEPIECE = ("mistral", "mixtral", "gemma", "gemma2", "gemma3", "phi3")
# In standard deviations of the logits; the KV cache is rounded to 16 bits.
TOLERANCE = 0.02


def logits_of(path: Path) -> list[np.ndarray]:
    """llama.cpp's, after each of the prompt's tokens."""
    rows = len(PROMPT)
    with closing(Model(path, 0)) as model:
        context = Context(model, slots=1, context_length=128, batch_tokens=64, threads=1)
        with closing(context):
            context.decode(list(PROMPT), range(rows), [0] * rows, [True] * rows)
            return [log_softmax(context.logits(row)) for row in range(rows)]


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_it_does_in_transformers(name: str, tmp_path: Path) -> None:
    model = recorded(name)
    folder = model.write(tmp_path / "model")
    if name.startswith(OF_SENTENCEPIECE):
        write_space_tokenizer(folder, prefix=not name.startswith("gemma"))
    else:
        write_byte_tokenizer(folder)
    made = convert_checkpoint(folder, tmp_path / "made.gguf", None)
    assert made.quantization == "F32"
    assert read_header(tmp_path / "made.gguf").file_type == 0
    kept = len(model.logits)
    found = np.array(logits_of(tmp_path / "made.gguf")[-kept:])
    expected = np.array([log_softmax(row) for row in model.logits])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
