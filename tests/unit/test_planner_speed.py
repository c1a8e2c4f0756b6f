"""The planner's speed model beside measurements that others have published."""

from __future__ import annotations

import pytest

from serving.hardware.catalog import find_card
from serving.models.catalog import find_model
from serving.models.hf_config import architecture_of
from serving.planner.memory import Offload
from serving.planner.rig import Rig, assumed_rig, device_of
from serving.planner.settings import Settings
from serving.planner.speed import Speed, speed_of
from serving.planner.weights import predicted

HOST = assumed_rig((), None, reserve_mib=0, gpu_reserve_mib=0).host
LLAMA = "llama-3.1-8b-instruct"
# Model, card, quantization, sequences in a batch, tokens a second in all; where it is published.
DECODE = [
    (LLAMA, "rtx 3090", "Q4_0", 1, 156.6),  # ggml-org/llama.cpp#15802
    (LLAMA, "rtx 3090", "Q4_0", 4, 470.5),
    (LLAMA, "rtx 3090", "Q4_0", 8, 583.8),
    (LLAMA, "rtx 4090", "Q4_0", 16, 1930.5),  # ggml-org/llama.cpp#15131
    ("gpt-oss-20b", "rtx 3090", "MXFP4_MOE", 1, 237.5),  # ggml-org/llama.cpp#20586
    ("gpt-oss-20b", "rtx 3090", "MXFP4_MOE", 8, 514.7),
    ("gpt-oss-20b", "rtx 3090", "MXFP4_MOE", 32, 1227.8),
    ("gpt-oss-20b", "rtx 3090", "MXFP4_MOE", 64, 1663.1),
    ("deepseek-v2-lite-chat", "rtx 3090", "Q4_0", 16, 784.3),  # ggml-org/llama.cpp#15525
    ("qwen3-8b", "rtx 5090", "Q4_K_M", 1, 221.7),  # CambrianTech/continuum#1627
    (LLAMA, "rx 7900 xtx", "Q2_K", 1, 131.0),  # ggml-org/llama.cpp#26284
    (LLAMA, "m1 max 32-core 64gb", "Q4_K_M", 1, 46.2),  # brand-o/normiebench#40
    (LLAMA, "ryzen ai max 390 64gb", "Q4_K_M", 1, 41.6),  # deseven/strixhalo-homelab#11
    # AlexsJones/llmfit, llmfit-core/data/community, August 2026; prompts' time is in it.
    ("qwen3-14b", "rtx 5070", "Q4_K_M", 1, 59.0),
    (LLAMA, "rtx 2080", "Q4_K_M", 1, 71.9),
    ("qwen3.5-27b", "dgx spark", "Q4_K_M", 1, 11.3),
    ("qwen3.5-122b-a10b", "dgx spark", "Q4_K_M", 1, 29.0),
    ("nvidia-nemotron-3-nano-30b-a3b-bf16", "dgx spark", "Q4_K_M", 1, 65.6),
    (LLAMA, "rx 7900 xt", "Q4_K_M", 1, 114.3),
    ("mistral-small-3.2-24b-instruct-2506", "rx 7900 xt", "Q4_K_M", 1, 43.1),
    ("qwen3.8-27b", "rx 7900 xt", "Q4_K_M", 1, 30.8),
    ("qwen3-30b-a3b-instruct-2507", "rx 7900 xt", "Q4_K_M", 1, 151.8),
    ("gpt-oss-20b", "rx 7900 xt", "MXFP4_MOE", 1, 162.6),
    ("llama-3.2-3b-instruct", "m4 pro 16-core 24gb", "Q4_K_M", 1, 95.3),
    ("qwen3-14b", "m4 pro 16-core 24gb", "Q4_K_M", 1, 26.6),
    ("gpt-oss-20b", "m4 pro 16-core 24gb", "MXFP4_MOE", 1, 66.5),
    ("qwen3-4b", "gtx 1050 ti", "Q4_K_M", 1, 17.3),
    # PMZFX/intel-arc-pro-b70-benchmarks, SYCL, April 2026.
    (LLAMA, "arc pro b70", "Q4_K_M", 1, 82.6),
    ("phi-4", "arc pro b70", "Q4_K_M", 1, 43.7),
    ("mistral-small-3.2-24b-instruct-2506", "arc pro b70", "Q4_K_M", 1, 30.1),
    ("qwen3.5-27b", "arc pro b70", "Q4_K_M", 1, 20.4),
    ("qwen3.6-35b-a3b", "arc pro b70", "Q4_K_M", 1, 54.7),
    # AlexsJones/llmfit, llmfit-core/data/benchmark_cache.json.
    ("qwen3.6-35b-a3b", "rtx 4090", "Q4_K_M", 1, 165.1),
    ("qwen3.5-35b-a3b", "rtx 3090", "Q4_K_M", 1, 124.4),
    ("qwen3.6-35b-a3b", "rtx 5090", "Q4_K_M", 1, 210.4),
    ("qwen3.6-35b-a3b", "m4 pro 20-core 48gb", "Q4_K_M", 1, 47.1),
]
PREFILL = [
    (LLAMA, "rtx 3080 10gb", "Q4_K_M", 3806.9),  # dmatora/LLM-inference-speed-benchmarks#12
    ("gpt-oss-20b", "rtx 3090", "MXFP4_MOE", 4702.8),  # ggml-org/llama.cpp#20586
    (LLAMA, "rx 7900 xtx", "Q2_K", 2152.3),  # ggml-org/llama.cpp#26284
    (LLAMA, "m1 max 32-core 64gb", "Q4_K_M", 499.6),  # brand-o/normiebench#40
    ("llama-3.2-3b-instruct", "m1 ultra 64-core 128gb", "Q4_K_M", 2142.6),  # geerlingguy/ai-benchmarks#48
    (LLAMA, "ryzen ai max 390 64gb", "Q4_K_M", 833.0),  # deseven/strixhalo-homelab#11
    (LLAMA, "arc pro b70", "Q4_K_M", 2452.0),  # PMZFX/intel-arc-pro-b70-benchmarks
    ("phi-4", "arc pro b70", "Q4_K_M", 1424.0),
    ("mistral-small-3.2-24b-instruct-2506", "arc pro b70", "Q4_K_M", 994.0),
]  # fmt: skip

# Llama 2 7B in Q4_0, prompts of 512 tokens and answers of 128, in llama.cpp's lists of cards:
# https://github.com/ggml-org/llama.cpp/discussions/15013, /4167 (Apple) and /15021 (AMD).
LLAMA_2_7B = architecture_of(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "num_attention_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
    }
)
LISTED = [
    ("rtx pro 6000 blackwell workstation", 16619, 281.1),
    ("rtx 5090", 14970, 300.4),
    ("rtx 4090", 14771, 189.0),
    ("h100 sxm", 11263, 280.7),
    ("rtx 5080", 9488, 184.7),
    ("a100 sxm4 80gb", 5286, 200.9),
    ("rtx 3090", 5175, 158.2),
    ("rtx 3060 12gb", 2138, 75.6),
    ("jetson agx orin 64gb", 991, 33.6),
    ("m1 ultra 64-core 64gb", 1030, 83.7),
    ("m2 ultra 76-core 64gb", 1238, 94.3),
    ("m3 ultra 80-core 96gb", 1471, 92.1),
    ("m4 pro 20-core 48gb", 440, 50.7),
    ("m4 max 40-core 48gb", 886, 83.1),
    ("m5 max 40-core 64gb", 3347, 119.1),
    ("rx 7900 xtx", 3552, 167.1),
    ("rx 7900 xt", 3098, 116.2),
    ("radeon pro w7900", 3213, 121.2),
    ("tesla p40", 934, 56.3),  # ggml-org/llama.cpp#4766
]


def speed(
    name: str,
    card: str,
    mixture: str,
    users: int = 1,
    context_tokens: int = 64,
    offload: Offload | None = None,
) -> Speed:
    model = find_model(name)
    assert model is not None
    rig = Rig(HOST, (device_of(find_card(card), reserve_mib=0),))
    return speed_of(
        model.architecture,
        predicted(model.architecture, mixture),
        rig,
        Offload((1.0,)) if offload is None else offload,
        Settings(4096, users),
        users=users,
        context_tokens=context_tokens,
    )


@pytest.mark.parametrize(("name", "card", "mixture", "users", "published"), DECODE)
def test_decoding_is_as_published(
    name: str, card: str, mixture: str, users: int, published: float
) -> None:
    estimate = speed(name, card, mixture, users)
    assert abs(estimate.all_users / published - 1) <= estimate.uncertainty


@pytest.mark.parametrize(("name", "card", "mixture", "published"), PREFILL)
def test_prefill_is_as_published(name: str, card: str, mixture: str, published: float) -> None:
    estimate = speed(name, card, mixture)
    assert abs(estimate.prefill / published - 1) <= estimate.uncertainty


@pytest.mark.parametrize(("card", "prefill", "decoding"), LISTED)
def test_cards_are_as_fast_as_llama_cpp_lists_them(
    card: str, prefill: float, decoding: float
) -> None:
    estimate = speed_of(
        LLAMA_2_7B,
        predicted(LLAMA_2_7B, "Q4_0"),
        Rig(HOST, (device_of(find_card(card), reserve_mib=0),)),
        Offload((1.0,)),
        Settings(4096, 1),
        users=1,
        context_tokens=64,
    )
    assert abs(estimate.one_user / decoding - 1) <= estimate.uncertainty
    assert abs(estimate.prefill / prefill - 1) <= estimate.uncertainty


def test_more_users_have_more_together_and_less_each() -> None:
    speeds = [speed(LLAMA, "rtx 3090", "Q4_K_M", users) for users in (1, 4, 16, 64)]
    totals = [each.all_users for each in speeds]
    assert totals == sorted(totals)
    each_waits = [each.seconds_per_token for each in speeds]
    assert each_waits == sorted(each_waits)


def test_long_texts_are_slower_to_go_on() -> None:
    short, long = (
        speed(LLAMA, "rtx 3090", "Q4_K_M", 8, context_tokens=tokens) for tokens in (100, 30_000)
    )
    assert long.all_users < 0.6 * short.all_users
    assert long.prefill < short.prefill


def test_what_the_processor_computes_slows_all_and_is_known_less_well() -> None:
    whole = speed("qwen3-30b-a3b", "rtx 3090", "Q4_K_M")
    experts = speed(
        "qwen3-30b-a3b", "rtx 3090", "Q4_K_M", offload=Offload((1.0,), experts_on_cpu=24)
    )
    layers = speed("qwen3-30b-a3b", "rtx 3090", "Q4_K_M", offload=Offload((1.0,), layers=24))
    assert layers.one_user < experts.one_user < 0.7 * whole.one_user
    assert experts.uncertainty > whole.uncertainty


def test_a_card_without_a_stated_clock_is_not_taken_for_endlessly_fast() -> None:
    older, newer = (
        speed(LLAMA, card, "Q4_K_M").prefill
        for card in ("m2 max 38-core 64gb", "m4 max 40-core 64gb")
    )
    assert 0.8 * older < newer < 2 * older
