"""LoRA adapters: which files are taken, and how they are named on the command line and in the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from serving.config import ConfigError, load_config
from serving.llamacpp.adapters import AdapterFile
from serving.models.adapters import UnfitAdapter, check_adapter
from tests.lora_files import Lora, random_lora, write_lora

QUERY, EXPERTS, EMBEDDING = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight", "token_embd.weight"
INPUTS, OUTPUTS, EXPERT_COUNT, TOKENS = 8, 16, 3, 50


def write_base(path: Path, *names: str) -> Path:
    """A file with the header of a model; ``names`` are more tensors than its own."""
    writer = gguf.GGUFWriter(path, "llama")
    shapes: dict[str, tuple[int, ...]] = {
        QUERY: (OUTPUTS, INPUTS),
        EXPERTS: (EXPERT_COUNT, OUTPUTS, INPUTS),
        EMBEDDING: (TOKENS, INPUTS),
        "blk.0.attn_norm.weight": (INPUTS,),
    }
    for name, shape in (shapes | dict.fromkeys(names, (TOKENS, INPUTS))).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.gguf")


def lora(a_shape: tuple[int, ...], b_shape: tuple[int, ...], name: str = QUERY) -> Lora:
    return Lora({name: (np.ones(a_shape, np.float32), np.ones(b_shape, np.float32))}, alpha=4.0)


FITTING = lora((2, INPUTS), (OUTPUTS, 2))


@pytest.mark.parametrize(
    "adapter",
    [
        FITTING,
        lora((1, INPUTS), (OUTPUTS, 1)),
        lora((EXPERT_COUNT, 2, INPUTS), (EXPERT_COUNT, OUTPUTS, 2), EXPERTS),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_adapter_of_the_base_fits(tmp_path: Path, base: Path, adapter: Lora, dtype: Any) -> None:
    pairs = {name: (a.astype(dtype), b.astype(dtype)) for name, (a, b) in adapter.pairs.items()}
    path = write_lora(tmp_path / "lora.gguf", Lora(pairs, adapter.alpha))
    check_adapter(path, base)


def test_an_embedding_fits_unless_the_output_layer_shares_it(tmp_path: Path, base: Path) -> None:
    path = write_lora(tmp_path / "lora.gguf", lora((TOKENS, 2), (INPUTS, 2), EMBEDDING))
    check_adapter(path, write_base(tmp_path / "untied.gguf", "output.weight"))
    with pytest.raises(UnfitAdapter, match="shares with its output layer"):
        check_adapter(path, base)


@pytest.mark.parametrize(
    ("adapter", "fields", "fault"),
    [
        (FITTING, {"type": "model"}, "its general.type is 'model'; 'adapter' is needed here"),
        (FITTING, {"type": None}, "its general.type is missing"),
        (FITTING, {"adapter_type": "control_vector"}, "its adapter.type is 'control_vector'"),
        (FITTING, {"architecture": "qwen3"}, "general.architecture is 'qwen3'; 'llama' is needed"),
        # llama.cpp ends the process over these two, and over wrong expert counts at the first batch.
        (FITTING, {"type": 7}, "its general.type is 7; 'adapter' is needed here"),
        (FITTING, {"alpha": 16}, "its adapter.lora.alpha is 16; a finite 32-bit float"),
        (
            lora((2, 2, INPUTS), (2, OUTPUTS, 2), EXPERTS),
            {},
            r"the shapes \[8, 2, 2\] and \[2, 16, 2\] of its .* the base model's \[8, 16, 3\]",
        ),
        (lora((2, 2, INPUTS), (2, OUTPUTS, 2)), {}, "made for another model"),
        (FITTING, {"alpha": float("nan")}, "its adapter.lora.alpha is nan"),
        (lora((2, 9), (OUTPUTS, 2)), {}, r"the shapes \[9, 2\] and \[2, 16\] .* \[8, 16\]"),
        (lora((2, INPUTS), (17, 2)), {}, "made for another model"),
        (lora((2, INPUTS), (OUTPUTS, 3)), {}, "made for another model"),
        (
            lora((2, INPUTS), (1, 2), "blk.0.attn_norm.weight"),
            {},
            "llama.cpp changes matrices only",
        ),
        (
            lora((2, INPUTS), (OUTPUTS, 2), "blk.9.attn_q.weight"),
            {},
            "'blk.9.attn_q.weight', which",
        ),
        (Lora({}, 1.0), {}, "it has no tensors"),
        (lora((2, INPUTS), (OUTPUTS, 2)), {"extra": "x.weight"}, "'x.weight' is neither"),
        (lora((2, INPUTS), (OUTPUTS, 2)), {"extra": "x.lora_a"}, "'x', which the base"),
        (Lora({}, 1.0), {"extra": f"{QUERY}.lora_a"}, "only one of lora_a and lora_b"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, base: Path, adapter: Lora, fields: dict[str, Any], fault: str
) -> None:
    path = write_lora(tmp_path / "lora.gguf", adapter, **fields)
    with pytest.raises(UnfitAdapter, match=fault):
        check_adapter(path, base)


def test_types_that_cannot_be_multiplied_are_named(tmp_path: Path, base: Path) -> None:
    pairs: Any = {QUERY: (np.ones((2, INPUTS), np.int32), np.ones((OUTPUTS, 2), np.float32))}
    path = write_lora(tmp_path / "lora.gguf", Lora(pairs, 1.0))
    with pytest.raises(UnfitAdapter, match="of type 26; F32, F16, BF16 and Q8_0 can be used"):
        check_adapter(path, base)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_that_are_no_numbers_are_found(
    tmp_path: Path, base: Path, value: float, dtype: Any
) -> None:
    a, b = np.ones((2, INPUTS), dtype), np.ones((OUTPUTS, 2), dtype)
    b[3, 1] = value
    path = write_lora(tmp_path / "lora.gguf", Lora({QUERY: (a, b)}, 1.0))
    with pytest.raises(UnfitAdapter, match=r"attn_q.weight.lora_b' holds values that are infinite"):
        check_adapter(path, base)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, base: Path) -> None:
    whole = write_lora(tmp_path / "lora.gguf", FITTING).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 20, 100, 300, len(whole) - 100, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(UnfitAdapter, match=r"ends early|is empty|not a GGUF file"):
            check_adapter(cut, base)


def _missing(folder: Path) -> Path:
    return folder / "nowhere.gguf"


def _folder(folder: Path) -> Path:
    return folder


def _other_format(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    return path


@pytest.mark.parametrize(
    ("make", "fault"),
    [(_missing, "no such file"), (_folder, "no such file"), (_other_format, "not a GGUF file")],
)
def test_what_is_no_adapter_at_all(
    tmp_path: Path, base: Path, make: Callable[[Path], Path], fault: str
) -> None:
    with pytest.raises(UnfitAdapter, match=fault):
        check_adapter(make(tmp_path), base)


def test_the_tensors_of_a_split_model_are_all_known(tmp_path: Path) -> None:
    first = tmp_path / "big-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(first, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_base(tmp_path / "big-00002-of-00002.gguf")
    check_adapter(write_lora(tmp_path / "lora.gguf", FITTING), first)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("law=/m/law.gguf", AdapterFile("law", Path("/m/law.gguf"), 1.0)),
        ("law=/m/law.gguf:0.5", AdapterFile("law", Path("/m/law.gguf"), 0.5)),
        ("org/law:v2=C:\\m\\law.gguf", AdapterFile("org/law:v2", Path("C:\\m\\law.gguf"), 1.0)),
        ("law=/m/a=b:c.gguf:-1e-2", AdapterFile("law", Path("/m/a=b:c.gguf"), -0.01)),
    ],
)
def test_adapters_on_the_command_line(text: str, expected: AdapterFile) -> None:
    assert AdapterFile.parse(text) == expected


CONFIG = """
models:
  - name: base
    source: base.gguf
    aliases: [other]
    adapters:
      - {name: law, path: law.gguf}
      - {name: code, path: code.gguf, scale: 0.5}
"""


def test_adapters_in_the_config(tmp_path: Path) -> None:
    for name in ("base.gguf", "law.gguf", "code.gguf"):
        (tmp_path / name).touch()
    path = tmp_path / "rig.yaml"
    path.write_text(CONFIG)
    law, code = load_config(path).models[0].adapters
    assert (law.name, law.path, law.scale) == ("law", str(tmp_path / "law.gguf"), 1.0)
    assert (code.name, code.scale) == ("code", 0.5)


def test_an_adapter_may_be_a_folder_of_pefts(tmp_path: Path) -> None:
    for name in ("base.gguf", "code.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "adapter_config.json").touch()
    path = tmp_path / "rig.yaml"
    sums = f"path: law, sha256: {'AB' * 32}"
    path.write_text(CONFIG.replace("path: law.gguf", sums))
    law, _ = load_config(path).models[0].adapters
    assert (law.path, law.sha256) == (str(tmp_path / "law"), "ab" * 32)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("law.gguf", "law2.gguf", "models[0].adapters[0].path: there is no file"),
        ("name: code", "name: law", "8: models[0].adapters[1].name: the name 'law' is taken by"),
        ("name: code", "name: other", "8: models[0].adapters[1].name: the name 'other' is taken"),
        ("scale: 0.5", "scale: strong", "adapters[1].scale: expected a number; got 'strong'"),
        ("scale: 0.5", "weight: 0.5", "adapters[1].weight: unknown key; known: name, path, scale"),
        ("scale: 0.5", "sha256: abc", "adapters[1].sha256: 'abc' is no SHA-256, which has 64"),
        ("source: base.gguf", "source: base.gguf\n    sha256: x", "models[0].sha256: 'x' is no"),
        ("path: law.gguf", "path: .", "models[0].adapters[0].path: the folder "),
        ("aliases: [other]", f"projector_sha256: {'a' * 64}", "there is no projector; set both"),
        ("aliases: [other]", f"draft_model_sha256: {'a' * 64}", "there is no draft_model; set"),
        ("name: law, ", "", "7: models[0].adapters[0].name: this key is required"),
    ],
)
def test_mistakes_about_adapters_in_the_config(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    for name in ("base.gguf", "law.gguf", "code.gguf"):
        (tmp_path / name).touch()
    path = tmp_path / "rig.yaml"
    path.write_text(CONFIG.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert problem in str(error.value)


def test_a_random_adapter_of_the_tests_fits(tmp_path: Path, base: Path) -> None:
    adapter = random_lora({QUERY: (OUTPUTS, INPUTS)}, seed=1)
    check_adapter(write_lora(tmp_path / "lora.gguf", adapter), base)
