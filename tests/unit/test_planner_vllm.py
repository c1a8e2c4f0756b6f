"""vLLM's blocks of KV cache beside what it has logged elsewhere."""

from __future__ import annotations

import pytest

from serving.models.architecture import Architecture
from serving.models.catalog import find_model
from serving.planner.vllm import BLOCK_TOKENS, activation_bytes, kv_blocks, vllm_memory

GIB = 2**30


def architecture_of(name: str) -> Architecture:
    model = find_model(name)
    assert model is not None
    return model.architecture


# Model, cards, "kv_cache_size" or "Available KV cache memory" of one in GiB, tokens in the cache; vllm-project/vllm's issue.
@pytest.mark.parametrize(
    ("name", "cards", "cache_gib", "logged_tokens"),
    [
        ("llama-3.1-8b-instruct", 1, 3.81, 1952 * 16),  # 10517
        ("llama-3.1-8b-instruct", 1, 2.89, 1478 * 16),  # 10517
        ("qwen3-235b-a22b", 4, 8.11, 178_880),  # 21348
    ],
)
def test_blocks_are_as_logged(name: str, cards: int, cache_gib: float, logged_tokens: int) -> None:
    blocks = kv_blocks(architecture_of(name), int(cache_gib * GIB), cards)
    assert blocks * BLOCK_TOKENS == pytest.approx(logged_tokens, rel=0.05)


# The same card and model with steps of 20,000 and 29,000 tokens: peak_torch_memory less the weights' 14.99 GiB.
@pytest.mark.parametrize(("step_tokens", "logged_gib"), [(20_000, 17.06), (29_000, 17.98)])
def test_a_steps_peak_is_as_logged(step_tokens: int, logged_gib: float) -> None:
    peak = activation_bytes(architecture_of("llama-3.1-8b-instruct"), step_tokens)
    assert peak == pytest.approx((logged_gib - 14.99) * GIB, rel=0.05)


# "Memory profiling results: total_gpu_memory=23.58GiB ... # GPU blocks: 1952", of the same log.
def test_all_of_it_together() -> None:
    architecture = architecture_of("llama-3.1-8b-instruct")
    found = vllm_memory(
        architecture, 2 * architecture.parameters, int(23.58 * GIB), step_tokens=20_000
    )
    assert found.weights == pytest.approx(14.9888 * GIB, rel=0.01)
    assert found.cache_blocks == pytest.approx(1952, rel=0.10)


def test_weights_that_leave_no_room_leave_no_blocks() -> None:
    architecture = architecture_of("llama-3.3-70b-instruct")
    assert vllm_memory(architecture, 2 * architecture.parameters, 24 * GIB).cache_blocks == 0
