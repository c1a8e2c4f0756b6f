"""What of PEFT's adapters cannot be converted is refused by name, and leaves no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from serving.models.gguf import read_header
from serving.models.peft import convert_adapter
from serving.models.sources import ModelError
from tests.peft_files import Matrix, write_peft, write_safetensors

WIDTH, HEADS, TOKENS = 16, 2, 50
QUERY = "model.layers.0.self_attn.q_proj"
A, B = np.ones((4, WIDTH), np.float32), np.arange(4.0 * WIDTH, dtype=np.float32).reshape(WIDTH, 4)


def write_base(path: Path, architecture: str = "llama") -> Path:
    """A file with the header of a model of one layer, whose output layer is its embedding."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    for name, rows in (("token_embd", TOKENS), ("blk.0.attn_q", WIDTH), ("blk.0.attn_k", WIDTH)):
        writer.add_tensor(f"{name}.weight", np.ones((rows, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor(path: Path, name: str) -> Matrix:
    (found,) = (each for each in gguf.GGUFReader(path).tensors if each.name == name)
    return np.array(found.data)


def refused(folder: Path, base: Path, message: str) -> None:
    target = folder.parent / "out.gguf"
    with pytest.raises(ModelError, match=message):
        convert_adapter(folder, base, target)
    assert not list(folder.parent.glob("out.gguf*"))


def test_rows_go_where_llama_cpp_has_them(tmp_path: Path) -> None:
    """Of a head of 8 rows, row 0 goes beside row 4, row 1 beside row 5, …: only where the family's files have it so."""
    folder = write_peft(tmp_path / "tuned", {QUERY: (A, B)})
    for architecture, order in (("llama", [0, 4, 1, 5, 2, 6, 3, 7]), ("qwen2", range(8))):
        base = write_base(tmp_path / f"{architecture}.gguf", architecture)
        assert convert_adapter(folder, base, tmp_path / "out.gguf") == 1
        rows = [head + row for head in (0, 8) for row in order]
        assert np.array_equal(tensor(tmp_path / "out.gguf", "blk.0.attn_q.weight.lora_b"), B[rows])
        header = read_header(tmp_path / "out.gguf")
        assert header.values["adapter.lora.alpha"].data == 8.0
        assert header.text("general.architecture") == architecture


def test_an_alpha_of_zero_switches_the_adapter_off(tmp_path: Path) -> None:
    """llama.cpp takes an alpha of 0 for none, and would apply the whole of it."""
    folder = write_peft(tmp_path / "tuned", {QUERY: (A, B)}, lora_alpha=0)
    convert_adapter(folder, write_base(tmp_path / "base.gguf"), tmp_path / "out.gguf")
    assert not tensor(tmp_path / "out.gguf", "blk.0.attn_q.weight.lora_b").any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora: DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: whole layers"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: embeddings"),
        ({"target_parameters": ["experts.up"]}, "target_parameters: "),
        ({"layer_replication": [[0, 1]]}, "layer_replication: "),
        ({"lora_bias": True}, "lora_bias: "),
        ({"bias": "all"}, "bias: 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: "),
        ({"use_qalora": True}, "use_qalora: "),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: "),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"lora_alpha": None}, "lora_alpha: a number"),
        ({"peft_type": "IA3"}, "peft_type in its adapter_config.json is 'IA3'"),
        ({"use_dora": True, "bias": "all"}, "use_dora: .*; bias: "),
    ],
)
def test_settings_without_a_place_in_gguf_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_peft(tmp_path / "tuned", {QUERY: (A, B)}, **config)
    refused(folder, write_base(tmp_path / "base.gguf"), message)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            {"model.layers.0.self_attn.qq": (A, B)},
            "'model.layers.0.self_attn.qq', which is not known",
        ),
        ({"model.layers.1.self_attn.q_proj": (A, B)}, "layers.1.self_attn.q_proj', which is not"),
        ({"model.layers.0.self_attn.o_proj": (A, B)}, "'blk.0.attn_output.weight', which the base"),
        ({"lm_head": (A, np.ones((TOKENS, 4), np.float32))}, "'output.weight', which the base"),
        ({QUERY: (A[:, :8], B)}, "made for another model"),
        ({QUERY: (A, B[:8])}, "made for another model"),
        ({QUERY: (A, B[:6])}, "6 rows do not fit the base model's 2 heads"),
        ({QUERY: (A[:2], B)}, r"the shapes \[2, 16\] and \[16, 4\]"),
        ({QUERY: (A * np.nan, B)}, "infinite or not numbers"),
        ({}, "it has no tensors"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    pairs: dict[str, tuple[Matrix, Matrix]], message: str, tmp_path: Path
) -> None:
    folder = write_peft(tmp_path / "tuned", pairs)
    refused(folder, write_base(tmp_path / "base.gguf"), message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "lora_embedding_A' cannot be"),
        (
            f"base_model.model.{QUERY}.lora_magnitude_vector.weight",
            "magnitude_vector.weight' cannot",
        ),
        (
            "base_model.model.lm_head.weight",
            "'base_model.model.lm_head.weight' cannot be converted",
        ),
        (f"base_model.model.{QUERY}.lora_A.weight", "only one of lora_A and lora_B"),
    ],
)
def test_tensors_that_are_no_pair_are_refused(name: str, message: str, tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "tuned", {})
    write_safetensors(folder / "adapter_model.safetensors", {name: A})
    refused(folder, write_base(tmp_path / "base.gguf"), message)


def damaged(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged(lambda path: path.write_bytes(path.read_bytes()[:-8])), "is damaged"),
        (damaged(lambda path: path.write_bytes(b"{}")), "is damaged"),
        (damaged(lambda path: path.unlink()), "adapter_model.safetensors No such file"),
        (damaged(lambda path: path.rename(path.with_suffix(".bin"))), "is a pickle"),
        (
            damaged(lambda path: write_safetensors(path, {"base_model.model.x": A}, "I8")),
            "is of type I8; F32, F16 and BF16",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is no JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "peft_type in its"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json No such"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = write_peft(tmp_path / "tuned", {QUERY: (A, B)})
    change(folder)
    refused(folder, write_base(tmp_path / "base.gguf"), message)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "tuned", {QUERY: (A, B)})
    refused(folder, write_base(tmp_path / "mamba.gguf", "mamba"), "'mamba'; adapters of gemma, ")


def test_what_stood_there_stays_when_a_conversion_fails(tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    base = write_base(tmp_path / "base.gguf")
    convert_adapter(write_peft(tmp_path / "good", {QUERY: (A, B)}), base, target)
    before = target.read_bytes()
    with pytest.raises(ModelError):
        convert_adapter(write_peft(tmp_path / "bad", {QUERY: (A[:, :8], B)}), base, target)
    assert target.read_bytes() == before
