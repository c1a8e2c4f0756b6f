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
