"""`rigserve plan`: what it offers, what it recommends, and what it says when nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.cli import main
from serving.config import CostConfig, load_config
from serving.models.catalog import find_model
from serving.planner.card_classes import CLASSES, CardClass, plan_of, text_of
from serving.planner.options import Plan, Wishes, headroom_bytes, plan
from serving.planner.rig import assumed_rig
from serving.planner.subject import of_catalog

CONFIGS = Path(__file__).parents[2] / "configs"


def planned(name: str, *cards: str, memory_gib: int = 32, **wishes: float) -> Plan:
    model = find_model(name)
    assert model is not None
    rig = assumed_rig(cards, 1024 * memory_gib, reserve_mib=512, gpu_reserve_mib=512)
    return plan(of_catalog(model), rig, Wishes(**wishes), CostConfig())  # type: ignore[arg-type]


def test_what_is_offered_fits() -> None:
    for found in (
        planned("qwen3-8b", "rtx 3060 12gb"),
        planned("llama-3.3-70b-instruct", "rtx 3090", "rtx 3090"),
        planned("qwen3-30b-a3b", "rtx 4060 8gb", memory_gib=64),
        planned("gemma-3-27b-it", "rtx 4090"),
    ):
        assert found.options
        for option in found.options:
            # vLLM's is what it has room for in its cache; of the card it takes the same whatever is asked for.
            assert option.headroom_bytes >= 0
            if option.engine != "vllm":
                assert option.headroom_bytes == headroom_bytes(option.memory, found.rig)


def test_the_recommended_one_is_on_the_card_and_loses_little() -> None:
    best = planned("qwen3-8b", "rtx 3060 12gb").options[0]
    assert best.is_all_on_cards
    assert best.mixture in ("Q5_K_M", "Q6_K", "Q8_0")


def test_a_context_and_users_that_are_asked_for_are_had() -> None:
    found = planned("qwen3-8b", "rtx 3090", context_tokens=12_000, users=3)
    assert {(each.settings.context_length, each.speed.users) for each in found.options} == {
        (12_000, 3)
    }


def test_an_slo_puts_those_first_that_meet_it() -> None:
    found = planned("qwen3-32b", "rtx 5090", users=1, token_seconds=0.018)
    assert found.options[0].meets_wishes
    assert not all(each.meets_wishes for each in found.options)
    hopeless = planned("qwen3-32b", "rtx 5090", users=1, token_seconds=0.001)
    assert "nothing that fits meets the SLO" in hopeless.reason


def test_experts_go_to_main_memory_before_whole_layers_do() -> None:
    best = planned("qwen3-30b-a3b", "rtx 4060 8gb", memory_gib=64).options[0]
    assert best.offload.experts_on_cpu > 0
    assert best.engine == "llama_server"


def test_when_nothing_fits_it_says_by_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseek-v3", "--gpu", "rtx 4090"]) == 1
    said = capsys.readouterr().out
    assert "does not fit" in said
    assert "GiB more memory" in said


def test_it_names_a_card_that_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["llama-3.3-70b-instruct", "--gpu", "rtx 3060 12gb", "--ram", "8"]
    assert main(["plan", *arguments]) == 1
    said = capsys.readouterr().out
    assert "such as" in said
    assert "GB" in said


def test_without_a_model_it_names_some_for_each_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "rtx 3060 12gb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["choices"]
    assert set(found) == {"chat", "code", "embedding"}
    for listed in found.values():
        assert 3 <= len(listed) <= 5
        for each in listed:
            assert each["memory_bytes"] < (12 + 32) * 2**30
            assert each["tokens_per_second_one_user"] > 8


def test_json_has_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qwen3-8b", "--gpu", "rtx 3090", "--users", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["options"][0]
    assert found["estimated"] is True
    assert best["users"] == 4
    assert best["memory_bytes"]["cards"][0]["total"] < 24 * 2**30
    assert best["usd_per_million_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qwen3-9b"], "no model of the catalog; near it: qwen3.5-9b, qwen3-8b"),
        (["qwen3-8b", "--gpu", "rtx 9999"], "--gpu: no card or machine of the catalog"),
        (["qwen3-8b", "--context", "0"], "--context is 0; give a number above 0"),
        (["qwen3-8b", "--context", "99999"], "--context is 99,999; qwen3-8b has 40,960 tokens at most"),
        (["qwen3-8b", "--users", "300"], "--users is 300; an engine has 256 at most"),
        (["no/such/file.gguf"], "there is no model file no/such/file.gguf"),
        (["glm-4-9b-0414", "--gpu", "rtx 3090", "--write", "c.yaml"], "say where one is with --source"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_file_is_planned_as_it_is(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model_path), "--gpu", "rtx 3060 12gb", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert len({each["quantization"] for each in options}) == 1


def test_a_written_config_is_one(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    arguments = ["plan", str(model_path), "--gpu", "rtx 3060 12gb", "--write", str(file)]
    assert main([*arguments, "--context", "4096", "--users", "2"]) == 0
    (model,) = load_config(file).local_models
    assert (model.source, model.context_length, model.max_sequences) == (str(model_path), 4096, 2)
    # What is there is not overwritten.
    assert main(arguments) == 2


@pytest.mark.parametrize("card_class", CLASSES, ids=lambda each: each.file)
def test_the_configs_of_card_classes_are_the_planners(card_class: CardClass) -> None:
    file = CONFIGS / card_class.file
    assert file.read_text() == text_of(card_class), "run: python -m serving.planner.card_classes"
    best = plan_of(card_class).options[0]
    assert best.headroom_bytes >= 0
    (model,) = load_config(file).local_models
    assert model.max_sequences == card_class.users
    assert model.context_length == card_class.context_tokens


def test_a_smaller_cache_is_offered_where_it_gives_more_context() -> None:
    found = planned("qwen3-14b", "rtx 4060 ti 16gb", users=4)
    of_q4 = [
        each for each in found.options if each.mixture == "Q4_K_M" and each.engine == "llama_cpp"
    ]
    contexts = {each.settings.key_type: each.settings.context_length for each in of_q4}
    assert contexts["Q8_0"] >= 2 * contexts["F16"]
    # With latent attention (MLA) and with recurrent layers it is not known to work.
    for name in ("deepseek-v2-lite-chat", "lfm2-1.2b"):
        assert not any(
            each.settings.has_small_cache for each in planned(name, "rtx 3060 12gb").options
        )
