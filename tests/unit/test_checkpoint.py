"""What of Hugging Face's models cannot be converted is refused by name, and leaves no file."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from serving.models.checkpoint import convert_checkpoint
from serving.models.checkpoint.sentencepiece import read_sentencepiece
from serving.models.checkpoint.vocabulary import read_vocabulary
from serving.models.gguf import read_header
from serving.models.sources import ModelError
from tests.peft_files import write_safetensors
from tests.tiny_checkpoints import (
    recorded,
    values,
    write_byte_tokenizer,
    write_space_tokenizer,
)


def save(folder: Path, name: str, **config: Any) -> Path:
    """A recorded model with other settings; a value of ``...`` is left out."""
    model = recorded(name)
    settings = {key: value for key, value in {**model.config, **config}.items() if value is not ...}
    dataclasses.replace(model, config=settings).write(folder)
    if name.startswith(("gemma", "mistral")):
        write_space_tokenizer(folder)
    else:
        write_byte_tokenizer(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def refused(folder: Path, message: str) -> None:
    target = folder.parent / "out.gguf"
    with pytest.raises(ModelError, match=message):
        convert_checkpoint(folder, target, None)
    assert not list(folder.parent.glob("out.gguf*"))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM; Gemma2ForCausalLM, "),
        ("llama", {"architectures": []}, "does not say which architecture"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "weights are quantized"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act in its config.json is 'gelu'"),
        ("llama", {"num_hidden_layers": "2"}, "num_hidden_layers in its config.json is '2'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'linear'.*factor"),
        ("llama", {"rope_parameters": ...}, "rope_theta in its config.json is None"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "mscale": 0.7}}, "'yarn' with mscale"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers"),
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob in its config.json is False"),
        ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob in its config.json is True"),
        ("qwen3moe", {"num_local_experts": 5}, "has 4 experts; its config says 5"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar in its config.json is 144"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "full attention every 6"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings"),
    ],
)  # fmt: skip
def test_settings_that_llama_cpp_does_not_compute(
    name: str, config: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    refused(save(tmp_path / "model", name, **config), message)


def test_tensors_that_are_unknown_missing_or_of_another_type(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen2")
    model = recorded("qwen2")
    tensors = {name: values(name, shape) for name, shape in model.shapes.items()}
    path = folder / "model.safetensors"
    write_safetensors(path, tensors | {"model.layers.0.adapter.weight": np.ones((2, 2), "<f4")})
    refused(folder, "'model.layers.0.adapter.weight' is not known of 'qwen2'")
    write_safetensors(path, tensors, "F8_E4M3")
    refused(folder, "is of type F8_E4M3")
    missing = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    write_safetensors(path, missing)
    refused(folder, r"llama.cpp cannot load what it becomes: .*'output_norm.weight' not found")
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "is damaged")
    path.unlink()
    refused(folder, "model.safetensors No such file")
    (folder / "pytorch_model.bin").touch()
    refused(folder, "are pickles")


def test_an_output_layer_of_its_own_must_be_there(tmp_path: Path) -> None:
    """llama.cpp would take the embedding in its place."""
    refused(
        save(tmp_path / "model", "qwen2", tie_word_embeddings=False), "'lm_head.weight' is miss"
    )


def test_tokenizers_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "qwen2")
    path = folder / "tokenizer.json"
    saved = path.read_bytes()
    model = json.loads(saved)["model"]
    edit(path, model=model | {"type": "Unigram"})
    refused(folder, "is of type Unigram")
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated"}
    edit(path, model=model, pre_tokenizer=split)
    refused(folder, r"cuts words by \['.*w\+'\], which is not known")
    path.write_bytes(saved)
    edit(path, normalizer={"type": "Lowercase"})
    refused(folder, "has the normalizer Lowercase")
    path.write_bytes(b"{")
    refused(folder, "is damaged")
    path.unlink()
    refused(folder, "neither a tokenizer.json nor a tokenizer.model")


def test_a_tokenizer_that_llama_cpp_would_read_otherwise(tmp_path: Path) -> None:
    """Its numbers are cut one way by its definition, another way by what llama.cpp is told."""
    folder = save(tmp_path / "model", "qwen2")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    # With this, the library reads tokens of its own making, which are in no merge.
    content["model"] |= {"ignore_merges": True, "vocab": content["model"]["vocab"] | {"The": 260}}
    path.write_text(json.dumps(content))
    refused(
        folder,
        r"llama.cpp would read text otherwise .* from token 0 on, \[84, 257, .*, not \[260, ",
    )


def test_weights_in_several_files_and_in_16_bits(tmp_path: Path) -> None:
    model = recorded("llama")
    whole = save(tmp_path / "whole", "llama")
    split = save(tmp_path / "split", "llama")
    tensors = {name: values(name, shape) for name, shape in model.shapes.items()}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        write_safetensors(split / file, {name: tensors[name] for name in held}, "BF16")
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (split / "model.safetensors").unlink()
    (split / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert_checkpoint(split, tmp_path / "split.gguf", None).quantization == "BF16"
    made = convert_checkpoint(whole, tmp_path / "whole.gguf", "BF16")
    assert made.quantization == "BF16"
    files = [gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("split", "whole")]
    ours, theirs = ({each.name: np.array(each.data) for each in file.tensors} for file in files)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    edit(split / "model.safetensors.index.json", weight_map={"a": "../a.safetensors"})
    refused(split, "names a file outside of the folder")


def test_of_a_model_that_sees_the_text_part_is_taken(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gemma3")
    (tmp_path / "text").mkdir()
    convert_checkpoint(folder, tmp_path / "text" / "out.gguf", None)
    text = recorded("gemma3")
    tensors = {name: values(name, shape) for name, shape in text.shapes.items()}
    seeing = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    seeing["vision_tower.patches.weight"] = np.ones((4, 4), np.float32)
    write_safetensors(folder / "model.safetensors", seeing)
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text.config}
    (folder / "config.json").write_text(json.dumps(config))
    convert_checkpoint(folder, tmp_path / "out.gguf", None)
    assert (tmp_path / "text" / "out.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_a_window_that_llama_cpp_does_not_have_bounds_the_context(tmp_path: Path) -> None:
    for window, expected in ((64, 64), (None, 512)):
        folder = save(tmp_path / f"model-{window}", "mistral", sliding_window=window)
        path = tmp_path / "out.gguf"
        convert_checkpoint(folder, path, None)
        assert read_header(path).integer("llama.context_length") == expected


def test_a_vocabulary_has_as_many_tokens_as_the_model_has_embeddings(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    more = read_vocabulary(tmp_path, 300)
    assert (len(more.tokens), more.tokens[299], more.types[299]) == (300, "[PAD299]", 5)
    fewer = read_vocabulary(tmp_path, 259)
    assert (len(fewer.tokens), fewer.left_out) == (259, ["<|user|>"])


def test_a_vocabulary_from_tokenizer_model(tmp_path: Path) -> None:
    """SentencePiece's own file, which older models have alone."""

    def field(number: int, value: bytes | int | float) -> bytes:
        if isinstance(value, bytes):
            return bytes([number << 3 | 2, len(value)]) + value
        if isinstance(value, float):
            return bytes([number << 3 | 5]) + struct.pack("<f", value)
        return bytes([number << 3, value])

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))

    pieces = piece("<unk>", 0.0, 2) + piece("<0x0A>", 0.0, 6) + piece("\u2581the", -1.5, 1)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(pieces + field(2, field(3, 2)) + field(3, field(3, 0)))
    assert not read_sentencepiece(path).adds_space_prefix
    added = {"content": "<|call|>", "special": False}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"3": added}})
    )
    found = read_vocabulary(tmp_path, 5)
    assert found.tokens == ["<unk>", "<0x0A>", "\u2581the", "<|call|>", "[PAD4]"]
    assert [int(kind) for kind in found.types] == [2, 6, 1, 3, 5]
    assert found.scores is not None
    assert found.scores[2] == -1.5
    path.write_bytes(pieces + field(2, field(3, 1)))
    with pytest.raises(Exception, match="not of type BPE"):
        read_vocabulary(tmp_path, 5)
    path.write_bytes(pieces[:-3])
    with pytest.raises(Exception, match="is damaged"):
        read_vocabulary(tmp_path, 5)


def test_phi_3_is_named_as_llama_cpp_knows_its_tokenizer_by(tmp_path: Path) -> None:
    """Its special tokens swallow the spaces after them; llama.cpp tells so by the name, in both directions."""
    folder = save(tmp_path / "model", "phi3")
    write_space_tokenizer(folder, phi3=True)
    convert_checkpoint(folder, tmp_path / "support.gguf", None)
    assert read_header(tmp_path / "support.gguf").text("general.name") == "support (Phi-3)"
    write_space_tokenizer(folder)
    convert_checkpoint(folder, tmp_path / "my-Phi-3.gguf", None)
    assert read_header(tmp_path / "my-Phi-3.gguf").text("general.name") == "my-phi"
