"""What `auto` in a config becomes, and what is refused because it cannot fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.cli import main
from serving.config import Auto, Config, ConfigError, LlamaCppModel, load_config
from serving.engines.fitting import Fitting
from serving.engines.footprint import of_gguf
from serving.engines.launch import Files
from serving.engines.llama_cpp import LlamaCppLauncher
from serving.hardware.memory import Gpu
from serving.models.catalog import find_model
from tools.gguf_skeleton import write_skeleton


class CardLauncher(LlamaCppLauncher):
    """As on a machine whose llama.cpp was built for cards."""

    uses_gpus = True


def config_of(tmp_path: Path, model: str, memory: str = "") -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(f"models:\n  - {model}\n{memory}")
    return load_config(file)


def fitting(
    config: Config, tmp_path: Path, kind: type[LlamaCppLauncher] = LlamaCppLauncher
) -> Fitting:
    return Fitting(config, {"llama_cpp": kind(tmp_path)})


def filled(config: Config, tmp_path: Path, kind: type[LlamaCppLauncher] = LlamaCppLauncher) -> Any:
    (model,) = fitting(config, tmp_path, kind).fill(fetch=True).config.local_models
    return model


def test_auto_takes_what_there_is_room_for(tmp_path: Path, model_path: Path) -> None:
    text = f"{{name: smol, source: {model_path}, context_length: auto, max_sequences: auto}}"
    for budget_mib in (1600, 2000, 6000):
        config = config_of(tmp_path, text, f"memory: {{budget_mib: {budget_mib}}}\n")
        (open_model,) = config.local_models
        assert isinstance(open_model.context_length, Auto)
        model = filled(config, tmp_path)
        assert not isinstance(model.context_length, Auto)
        used_mib = of_gguf(model, Files(model_path), on_gpu=False).host_mib
        assert used_mib <= budget_mib
        # One more step would be too much, or more than the model was trained for.
        more = model.model_copy(update={"max_sequences": 2 * model.max_sequences})
        longer = of_gguf(more, Files(model_path), on_gpu=False).host_mib
        assert longer > budget_mib or model.max_sequences == 16
    assert (model.context_length, model.max_sequences) == (8192, 16)


def test_one_number_is_found_beside_another_that_is_given(tmp_path: Path, model_path: Path) -> None:
    text = f"{{name: smol, source: {model_path}, context_length: 1024, max_sequences: auto}}"
    model = filled(config_of(tmp_path, text, "memory: {budget_mib: 1500}\n"), tmp_path)
    assert model.context_length == 1024
    assert 1 < model.max_sequences < 16


def test_a_shared_pool_bounds_the_context(tmp_path: Path, model_path: Path) -> None:
    text = f"{{name: smol, source: {model_path}, context_length: auto, kv_tokens: 1024}}"
    assert filled(config_of(tmp_path, text), tmp_path).context_length == 1024


def test_what_is_loaded_with_it_has_its_room_first(tmp_path: Path, model_path: Path) -> None:
    auto = f"{{name: smol, source: {model_path}, context_length: auto, max_sequences: 1}}"
    other = f"{{name: other, source: {model_path}, context_length: 4096, max_sequences: 8}}"
    memory = "memory: {budget_mib: 3650}\n"
    alone = filled(config_of(tmp_path, auto, memory), tmp_path)
    both = config_of(tmp_path, f"{auto}\n  - {other}", memory)
    beside = fitting(both, tmp_path).fill(fetch=True).config.local_models[0]
    assert beside.context_length < alone.context_length
    full = config_of(tmp_path, f"{auto}\n  - {other}", "memory: {budget_mib: 3000}\n")
    with pytest.raises(ConfigError, match="smol does not fit beside other: it needs"):
        fitting(full, tmp_path).fill(fetch=True)


def test_layers_go_to_the_card_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = find_model("qwen3-4b")
    assert entry is not None
    path = write_skeleton(tmp_path / "qwen.gguf", entry.architecture, "Q4_K_M")
    text = f"{{name: q, source: {path}, context_length: 4096, max_sequences: 1, gpu_layers: auto}}"
    config = config_of(tmp_path, text)
    found = []
    for total_mib in (2048, 3072, 8192):
        card = Gpu(0, "GPU-1", "a card", total_mib, total_mib)
        monkeypatch.setattr("serving.engines.fitting.gpus", lambda card=card: [card])
        model = filled(config, tmp_path, CardLauncher)
        needs = of_gguf(model, Files(path), on_gpu=True)
        assert needs.gpu_mib <= total_mib - 512
        found.append(model.gpu_layers)
    assert 0 < found[0] < found[1]
    assert found[2] == -1


def test_what_cannot_fit_is_refused_with_the_numbers(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(
        tmp_path,
        f"{{name: smol, source: {model_path}, context_length: 131072, max_sequences: 256}}",
    )
    file = tmp_path / "config.yaml"
    assert main(["config", "check", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{file}:2: models[0]: smol does not fit: it needs" in said
    assert "MiB of main memory (estimated)" in said


def test_auto_that_finds_no_room_is_refused(tmp_path: Path, model_path: Path) -> None:
    text = f"{{name: smol, source: {model_path}, context_length: auto}}"
    config = config_of(tmp_path, text, "memory: {budget_mib: 200}\n")
    with pytest.raises(ConfigError, match="smol does not fit"):
        fitting(config, tmp_path).fill(fetch=True)


def test_check_shows_what_auto_is(
    tmp_path: Path, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(
        tmp_path, f"{{name: smol, source: {model_path}, context_length: auto, max_sequences: 2}}"
    )
    assert main(["config", "check", str(tmp_path / "config.yaml")]) == 0
    assert "smol: context_length: 8192 (auto); " in capsys.readouterr().out


def test_what_is_not_here_is_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "hf://no-such-org/no-such-repo/model.gguf"
    config_of(tmp_path, f"{{name: far, source: '{source}', context_length: auto}}")
    assert main(["config", "check", str(tmp_path / "config.yaml")]) == 0
    said = capsys.readouterr().out
    assert "far: whether it fits is known once it is here" in said
    assert "far: auto is found once" in said


def test_only_auto_is_a_word_for_a_number(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(ConfigError, match="context_length"):
        config_of(tmp_path, f"{{name: smol, source: {model_path}, context_length: most}}")
    schema = LlamaCppModel.model_json_schema()["properties"]["context_length"]
    assert {"const": "auto"} in schema["anyOf"]
