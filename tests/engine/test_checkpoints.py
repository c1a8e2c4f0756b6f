"""`rigserve models convert` of whole models: llama.cpp computes what transformers does."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.llamacpp.measure import log_softmax
from serving.llamacpp.runtime import Context, Model
from serving.models.checkpoint import convert_checkpoint
from serving.models.checkpoint.vocabulary import PRE_TOKENIZERS
from serving.models.gguf import read_header
from tests.lora_files import write_model
from tests.tiny_checkpoints import (
    PROMPT,
    RECORDED,
    recorded,
    write_byte_tokenizer,
    write_embedded,
    write_embedded_tokenizer,
    write_space_tokenizer,
)

MODELS = list(json.loads((RECORDED / "models.json").read_bytes()))
OF_SENTENCEPIECE = ("mistral", "mixtral", "gemma", "gemma2", "gemma3", "phi3")
# In standard deviations of the logits; the KV cache is rounded to 16 bits.
TOLERANCE = 0.02


def logits_of(path: Path) -> list[NDArray[np.float64]]:
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


def test_the_embedded_model_comes_back_as_it_was(model_path: Path, tmp_path: Path) -> None:
    """Its first layers, made a Hugging Face folder and converted: the same logits, tokens and settings."""
    base = write_model(tmp_path / "base.gguf", model_path, layers=2)
    folder = write_embedded(tmp_path / "model", base, dtype="F32")
    convert_checkpoint(folder, tmp_path / "made.gguf", None)
    assert np.array_equal(logits_of(base), logits_of(tmp_path / "made.gguf"))
    ours, theirs = read_header(tmp_path / "made.gguf"), read_header(base)
    for key in ("pre", "model", "bos_token_id", "eos_token_id", "add_bos_token"):
        name = f"tokenizer.ggml.{key}"
        assert ours.values[name].data == theirs.values[name].data
    assert ours.text("tokenizer.chat_template") == theirs.text("tokenizer.chat_template")
    made = convert_checkpoint(folder, tmp_path / "small.gguf", "Q4_K_M")
    assert made.quantization == "Q4_K_M"
    assert read_header(tmp_path / "small.gguf").file_type == 15
    error = np.abs(np.array(logits_of(tmp_path / "small.gguf")) - np.array(logits_of(base))).mean()
    assert 0.01 < error < 1.0


@pytest.mark.parametrize("name", sorted({*PRE_TOKENIZERS.values(), "dbrx"}))
def test_words_are_cut_as_the_tokenizer_cuts_them(
    name: str, model_path: Path, tmp_path: Path
) -> None:
    """With the embedded model's 49,152 tokens and each way of cutting; the conversion itself compares."""
    definitions = {ours: theirs for theirs, ours in PRE_TOKENIZERS.items()}
    expressions = definitions["llama-bpe" if name == "dbrx" else name]
    shapes = {
        key: [49152, 64] if "embed_tokens" in key else shape
        for key, shape in recorded("qwen2").shapes.items()
    }
    model = dataclasses.replace(recorded("qwen2"), shapes=shapes)
    folder = model.write(tmp_path / "model", "BF16")
    write_embedded_tokenizer(folder, model_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    cuts = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in expressions
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, level]}
    content["model"]["ignore_merges"] = name == "llama-bpe"
    path.write_text(json.dumps(content))
    convert_checkpoint(folder, tmp_path / "made.gguf", None)
    assert read_header(tmp_path / "made.gguf").text("tokenizer.ggml.pre") == name
