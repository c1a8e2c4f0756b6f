"""The memory an engine was estimated to take, beside what its process takes when it has worked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from serving.config import LlamaCppModel
from serving.engines.footprint import of_gguf
from serving.engines.launch import Files, Footprint
from serving.hardware.memory import family_of, resident_mib
from tests.processes import ENGINE_KEY, EngineServer


def estimate(path: Path, **options: Any) -> Footprint:
    model = LlamaCppModel(name="smol", source=str(path), **options)
    return of_gguf(model, Files(path), on_gpu=False)


@pytest.mark.parametrize(
    "options",
    [
        {"context_length": 512, "max_sequences": 2, "prefix_cache_mib": 0},
        {
            "context_length": 512,
            "max_sequences": 2,
            "kv_tokens": 8192,
            "prefix_cache_mib": 16,
            "max_batch_tokens": 256,
        },
        # Twice as many tokens as above, in as much memory.
        {"context_length": 1024, "max_sequences": 2, "prefix_cache_mib": 0, "kv_type": "Q8_0"},
        {
            "context_length": 512,
            "max_sequences": 2,
            "prefix_cache_mib": 0,
            "flash_attention": False,
        },
    ],
)
def test_of_a_chat_model(model_path: Path, options: dict[str, Any]) -> None:
    flags = options | {"flash_attention": "on" if options.get("flash_attention", True) else "off"}
    with EngineServer(model_path, **flags) as engine:
        # Prompts of a full batch each, and more of them than slots: all buffers and prefixes are filled.
        for number in range(options["max_sequences"] + 1):
            prompt = f"{number} " + "sea " * (options["context_length"] - 32)
            answer = engine.client.completions.create(model="smol", prompt=prompt, max_tokens=2)
            assert answer.usage is not None
        used_mib = resident_mib(family_of(engine.process.pid))
    expected = estimate(model_path, **options)
    assert expected.source == "estimated"
    assert used_mib <= expected.host_mib <= 2 * used_mib


def test_of_an_embedding_model(minilm_path: Path) -> None:
    options = {"context_length": 256, "prefix_cache_mib": 0}
    with EngineServer(minilm_path, **options) as engine:
        answer = requests.post(
            f"{engine.base_url}/v1/embeddings",
            json={"model": "smol", "input": ["sea " * 200] * 4},
            headers={"authorization": f"Bearer {ENGINE_KEY}"},
            timeout=60,
        )
        assert answer.status_code == 200
        used_mib = resident_mib(family_of(engine.process.pid))
    assert used_mib <= estimate(minilm_path, **options).host_mib <= 2 * used_mib


def test_what_the_operator_says_counts(model_path: Path) -> None:
    set_by_hand = estimate(model_path, memory_mib=777)
    assert (set_by_hand.host_mib, set_by_hand.source) == (777, "configured")
    assert set_by_hand.corrected(100, None) == set_by_hand


def test_on_a_gpu_weights_and_context_go_there(model_path: Path) -> None:
    def on_gpu(layers: int) -> Footprint:
        model = LlamaCppModel(name="smol", source=str(model_path), gpu_layers=layers)
        return of_gguf(model, Files(model_path), on_gpu=True)

    on_cpu = estimate(model_path).host_mib
    all_there, half, none = on_gpu(-1), on_gpu(15), on_gpu(0)
    assert all_there.gpu_mib > half.gpu_mib > none.gpu_mib == 0
    assert all_there.host_mib < half.host_mib < on_cpu + 512
    assert none.host_mib == on_cpu


def test_measuring_corrects_the_estimate() -> None:
    guess = Footprint(host_mib=1000, gpu_mib=4000, growth_mib=300)
    # What can still grow stays reserved, within the estimate.
    fresh = guess.corrected(500, 3000)
    assert (fresh.host_mib, fresh.gpu_mib, fresh.source) == (800, 3000, "measured")
    # What it once needed it may need again, also beyond the estimate.
    assert fresh.corrected(1200, 2000).host_mib == 1200
    assert fresh.corrected(1200, 2000).corrected(400, None) == fresh.corrected(1200, None)
