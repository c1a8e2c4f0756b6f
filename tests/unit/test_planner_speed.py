"""The planner's speed model beside measurements that others have published."""

from __future__ import annotations

import pytest

from serving.hardware.catalog import find_card
from serving.models.catalog import find_model
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
]
PREFILL = [
    (LLAMA, "rtx 3080 10gb", "Q4_K_M", 3806.9),  # dmatora/LLM-inference-speed-benchmarks#12
    ("gpt-oss-20b", "rtx 3090", "MXFP4_MOE", 4702.8),  # ggml-org/llama.cpp#20586
    (LLAMA, "rx 7900 xtx", "Q2_K", 2152.3),  # ggml-org/llama.cpp#26284
    (LLAMA, "m1 max 32-core 64gb", "Q4_K_M", 499.6),  # brand-o/normiebench#40
    ("llama-3.2-3b-instruct", "m1 ultra 64-core 128gb", "Q4_K_M", 2142.6),  # geerlingguy/ai-benchmarks#48
    (LLAMA, "ryzen ai max 390 64gb", "Q4_K_M", 833.0),  # deseven/strixhalo-homelab#11
]  # fmt: skip


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
