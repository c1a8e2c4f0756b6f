"""vLLM's blocks of KV cache beside what it has logged elsewhere."""

from __future__ import annotations

import pytest

from serving.config import CostConfig
from serving.models.architecture import Architecture
from serving.models.catalog import find_model
from serving.planner.options import Wishes, plan
from serving.planner.rig import assumed_rig
from serving.planner.subject import of_catalog
from serving.planner.vllm import BLOCK_TOKENS, activation_bytes, in_awq, kv_blocks, vllm_memory

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


# One request alone on an RTX 4090: AlexsJones/llmfit#1046, noonghunna/club-3090#697.
@pytest.mark.parametrize(
    ("name", "mixture", "published"),
    [("qwen3-8b", "BF16", 58.7), ("qwen3-4b-instruct-2507", "FP8", 138.0)],
)
def test_its_speed_is_as_published(name: str, mixture: str, published: float) -> None:
    model = find_model(name)
    assert model is not None
    rig = assumed_rig(("rtx 4090",), None, reserve_mib=512, gpu_reserve_mib=512)
    wishes = Wishes(context_tokens=4096, users=1, prompt_tokens=200)
    options = plan(of_catalog(model), rig, wishes, CostConfig()).options
    (option,) = [each for each in options if (each.engine, each.mixture) == ("vllm", mixture)]
    assert option.speed.one_user == pytest.approx(published, rel=option.speed.uncertainty)
    # The rest of nine tenths of the card is its cache's.
    card = option.memory.cards[0]
    assert card.total + option.headroom_bytes == pytest.approx(0.9 * 24 * GIB, rel=0.01)


def test_it_is_offered_where_it_runs() -> None:
    model = find_model("qwen3-4b")
    assert model is not None

    def engines(*cards: str) -> set[str]:
        rig = assumed_rig(cards, None, reserve_mib=512, gpu_reserve_mib=512)
        found = plan(of_catalog(model), rig, Wishes(4096, 2), CostConfig())
        return {option.engine for option in found.options}

    assert "vllm" in engines("rtx 3090")
    assert "vllm" in engines("rtx 3090", "rtx 3090")
    assert "vllm" not in engines("rtx 3090", "rtx 3060 12gb")
    assert "vllm" not in engines("m2 ultra 76-core 128gb")
    assert "vllm" not in engines()


# graelo/Qwen2.5-7B-Instruct-1M-AWQ, of the same shape: safetensors of 4.48 and 1.09 GB.
def test_awq_weights_are_as_large_as_published_ones() -> None:
    model = find_model("qwen2.5-7b-instruct")
    assert model is not None
    weights = in_awq(of_catalog(model).weights("BF16"))
    assert weights.total_bytes == pytest.approx(5.57e9, rel=0.005)


def test_awq_is_offered_where_it_is_published() -> None:
    def engines(name: str, card: str) -> set[tuple[str, str]]:
        model = find_model(name)
        assert model is not None
        rig = assumed_rig([card], None, reserve_mib=512, gpu_reserve_mib=512)
        options = plan(of_catalog(model), rig, Wishes(users=4), CostConfig()).options
        return {(each.engine, each.mixture) for each in options}

    assert ("vllm", "AWQ") in engines("qwen3-8b", "rtx 3060 12gb")
    assert ("vllm", "BF16") not in engines("qwen3-8b", "rtx 3060 12gb")
    assert ("vllm", "AWQ") not in engines("qwen3-8b", "rtx 2080 ti")
    assert ("vllm", "AWQ") not in engines("mistral-nemo-instruct-2407", "rtx 3090")
