"""The catalog of models: each architecture has as many parameters as its maker says, so its figures are right."""

from __future__ import annotations

from typing import Any

import pytest

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    LatentAttention,
    Recurrent,
    UnreadArchitecture,
)
from serving.models.catalog import CatalogModel, catalog_models, find_model
from serving.models.hf_config import architecture_of

TOLERANCE, WITH_VISION = 0.01, 0.02
# "3B" may be what is computed with a token beside the embeddings, rounded: makers count differently.
ACTIVE_TOLERANCE_PARAMETERS = 0.13

# What the files of a model hold, of text, as others have counted: the Hub counts safetensors, llama.cpp prints
# `n_params`, an index of weights says `total_size` (two bytes each).
EXACT = {
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-1.5b-instruct": 1_543_714_304,
    "qwen2.5-3b-instruct": 3_085_938_688,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen2.5-32b-instruct": 32_763_876_352,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-v2-lite-chat": 15_706_484_224,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-coder-next": 79_674_391_296,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-2b": 1_881_825_088,
    "qwen3.5-4b": 4_205_751_296,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3-embedding-0.6b": 595_776_512,
    "qwen3-embedding-4b": 4_021_774_336,
    "qwen3-embedding-8b": 7_567_295_488,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "llama-3.2-1b-instruct": 1_235_814_400,
    "llama-3.2-3b-instruct": 3_212_749_824,
    "llama-3.3-70b-instruct": 70_553_706_496,
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-3-270m-it": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
    "embeddinggemma-300m": 302_863_104,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "ministral-8b-instruct-2410": 8_019_808_256,
    "mistral-nemo-instruct-2407": 12_247_782_400,
    "mistral-small-24b-instruct-2501": 23_572_403_200,
    "devstral-small-2507": 23_572_403_200,
    "magistral-small-2506": 23_572_403_200,
    "mistral-large-instruct-2411": 122_610_069_504,
    "phi-3.5-mini-instruct": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "phi-4-mini-instruct": 3_836_021_760,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4.5-air": 106_852_251_264,
    "glm-4.7": 352_797_829_024,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b-instruct": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-1124-7b-instruct": 7_298_617_344,
    "granite-3.3-2b-instruct": 2_533_539_840,
    "granite-3.3-8b-instruct": 8_170_864_640,
    "seed-oss-36b-instruct": 36_151_104_512,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "nvidia-nemotron-nano-9b-v2": 8_888_227_328,
    "minimax-m2.5": 228_689_764_864,
    "nomic-embed-text-v1.5": 136_731_648,
}


def named(name: str) -> Architecture:
    model = find_model(name)
    assert model is not None
    return model.architecture


def test_it_has_the_models_that_people_ask_for() -> None:
    models = catalog_models()
    assert len(models) >= 60
    assert len({model.name for model in models}) == len(models)
    for use in ("chat", "code", "embedding"):
        assert len([model for model in models if use in model.good_for]) >= 10
    for model in models:
        assert model.source.startswith("https://"), model.name
        assert model.config_source.startswith("https://huggingface.co/"), model.name
        assert model.license, model.name
        assert "2021-01" <= model.released <= "2026-12", model.name


@pytest.mark.parametrize("model", catalog_models(), ids=lambda model: model.name)
def test_the_architecture_has_the_published_number_of_parameters(model: CatalogModel) -> None:
    tolerance = WITH_VISION if model.counts_vision else TOLERANCE
    assert model.architecture.parameters == pytest.approx(model.parameters_published, rel=tolerance)


@pytest.mark.parametrize("name", EXACT)
def test_the_architecture_has_what_the_files_hold_to_the_last_number(name: str) -> None:
    assert named(name).parameters == EXACT[name]


@pytest.mark.parametrize(
    "model",
    [model for model in catalog_models() if model.active_parameters_published is not None],
    ids=lambda model: model.name,
)
def test_the_experts_in_use_are_the_published_ones(model: CatalogModel) -> None:
    architecture, published = model.architecture, model.active_parameters_published
    assert published is not None
    with_embeddings = architecture.active_parameters
    # Looking a token up is no computation, so some leave the table out, and some the output matrix too.
    table = architecture.width * architecture.vocabulary
    assert (
        min(abs(with_embeddings - tables * table - published) for tables in (0, 1, 2))
        <= ACTIVE_TOLERANCE_PARAMETERS * published
    )


def test_a_dense_model_computes_with_all_it_has() -> None:
    llama = named("llama-3.1-8b-instruct")
    assert llama.active_parameters == llama.parameters == 8_030_261_248
    layer = llama.layers[0].mixer
    assert isinstance(layer, Attention)
    assert layer.cache_elements == 2 * 8 * 128


def test_windows_are_where_the_family_has_them() -> None:
    def windows(name: str) -> list[int | None]:
        return [
            layer.mixer.window_tokens
            for layer in named(name).layers
            if isinstance(layer.mixer, Attention)
        ]

    assert windows("gemma-2-9b-it")[:4] == [4096, None, 4096, None]
    assert windows("gemma-3-12b-it")[:7] == [1024] * 5 + [None, 1024]
    assert windows("gpt-oss-20b")[:4] == [128, None, 128, None]
    assert windows("llama-4-scout-17b-16e-instruct")[:5] == [8192, 8192, 8192, None, 8192]
    assert windows("gemma-4-31b-it")[4:7] == [1024, None, 1024]
    assert windows("embeddinggemma-300m")[4:7] == [512, None, 512]
    assert set(windows("qwen2.5-7b-instruct")) == {None}
    assert set(windows("phi-4-mini-instruct")) == {None}  # its window is longer than its context


def test_layers_may_have_heads_of_their_own() -> None:
    local, overall = (named("gemma-4-26b-a4b-it").layers[index].mixer for index in (0, 5))
    assert isinstance(local, Attention)
    assert isinstance(overall, Attention)
    assert (local.kv_heads, local.key_width, local.values_are_keys) == (8, 256, False)
    assert (overall.kv_heads, overall.key_width, overall.values_are_keys) == (2, 512, True)


def test_latent_attention_keeps_a_short_vector_for_all_heads() -> None:
    attention = named("deepseek-v3").layers[0].mixer
    assert isinstance(attention, LatentAttention)
    assert attention.cache_elements == 512 + 64


def test_deepseek_begins_with_dense_layers() -> None:
    layers = named("deepseek-v3").layers
    assert [isinstance(layer.feed_forward, Experts) for layer in layers[:4]] == [
        False,
        False,
        False,
        True,
    ]


def test_hybrids_have_states_beside_caches() -> None:
    mixers = [layer.mixer for layer in named("qwen3-next-80b-a3b-instruct").layers]
    assert [isinstance(mixer, Recurrent) for mixer in mixers[:4]] == [True, True, True, False]
    state = mixers[0]
    assert isinstance(state, Recurrent)
    assert state.state_elements == 32 * 128 * 128
    nemotron = named("nvidia-nemotron-3-nano-30b-a3b-bf16").layers
    assert len([layer for layer in nemotron if isinstance(layer.mixer, Attention)]) == 6
    assert len([layer for layer in nemotron if isinstance(layer.feed_forward, Experts)]) == 23


def test_weights_have_the_names_and_shapes_of_a_gguf_file() -> None:
    weights = {weight.name: weight for weight in named("qwen3-30b-a3b").weights()}
    assert weights["token_embd.weight"].shape == (2048, 151936)
    assert weights["blk.0.attn_q.weight"].shape == (2048, 32 * 128)
    assert weights["blk.47.ffn_down_exps.weight"].shape == (768, 2048, 128)
    assert weights["blk.47.ffn_down_exps.weight"].of_experts == 128
    assert weights["blk.0.attn_k_norm.weight"].shape == (128,)


def test_a_model_is_found_by_name_and_repository() -> None:
    assert find_model("Qwen/Qwen3-8B") == find_model("QWEN3-8b")
    assert find_model("gpt-7") is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "no model_type"),
        ({"model_type": "rwkv"}, "model_type 'rwkv' is not known here"),
        ({"model_type": "llama"}, "no hidden_size"),
        (
            {"model_type": "llama", "hidden_size": "wide"},
            "hidden_size in its config.json is 'wide'",
        ),
        ({"model_type": "llama", "hidden_size": -1}, "hidden_size in its config.json is -1"),
    ],
)
def test_a_config_that_cannot_be_read_is_told(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnreadArchitecture) as refusal:
        architecture_of(config)
    assert says in str(refusal.value)
