"""Remotes and routes in a config: what is wrong with them is said by name, and the guide's examples load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from serving.config import Config, ConfigError, load_config

GUIDE = Path(__file__).parents[2] / "docs" / "routing.md"
MODELS = """\
models:
  - {name: home, source: hf://org/repo/file.gguf, aliases: [house]}
  - {name: away, engine: remote, base_url: "https://rig.example/v1/"}
  - name: paid
    engine: remote
    base_url: https://api.example/v1
    api_key_env: SOME_KEY
    usd_per_million: {input: 1.0, output: 2.0}
    budget_usd: 5.0
"""


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "rig.yaml"
    path.write_text(text)
    return load_config(path)


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_a_good_one(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        f"{MODELS}routes:\n  - {{name: chat, targets: [{{model: house}}], fallback: [away], "
        "spill_over: [paid], max_wait_seconds: 2.5}\n",
    )
    assert config.routes[0].models == ("house", "away", "paid")
    assert [model.name for model in config.local_models] == ["home"]
    away, paid = config.remote_models
    assert (away.base_url, away.costs_money, away.has_key) == (
        "https://rig.example/v1",
        False,
        False,
    )
    assert (paid.costs_money, paid.has_key) == (True, True)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("{name: r, targets: [{model: hone}]}", "no model 'hone'; did you mean 'home'?"),
        ("{name: r, targets: [{model: home}], fallback: [r]}", "'r' is this route itself"),
        ("{name: r, targets: [{model: home}, {model: home}]}", "in this route already"),
        ("{name: away, targets: [{model: home}]}", "the name 'away' is taken by models[1].name"),
        ("{name: house, targets: [{model: home}]}", "taken by models[0].aliases[0] on line 2"),
        ("{name: r, targets: []}", "routes[0].targets: expected a list with at least 1 entry"),
        ("{name: r, targets: [{model: home, weight: 0}]}", "expected more than 0"),
        (
            "{name: r, targets: [{model: home, weight: 1}, {model: away}]}",
            "some targets have a weight and some have none",
        ),
        (
            "{name: r, targets: [{model: home}], spill_over: [away]}",
            "'away' cannot be spilled over to: it needs a key (api_key_env or api_key_file), a price",
        ),
        ("{name: r, targets: [{model: away}], spill_over: [home]}", "it is not a remote model"),
        ("{name: r, target: [{model: home}]}", "did you mean 'targets'?"),
        (
            "{name: r, targets: [{model: home}]}\n  - {name: s, targets: [{model: r}]}",
            "'r' is a route; routes lead to models only, so that none leads in a circle",
        ),
    ],
)
def test_mistakes_in_routes(tmp_path: Path, route: str, expected: str) -> None:
    told = problem(tmp_path, f"{MODELS}routes:\n  - {route}\n")
    assert expected in told
    assert "rig.yaml:" in told


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{base_url: 'ftp://x'}", "models[0].base_url: 'ftp://x' is no base URL"),
        ("{base_url: 'https://user:pw@x/v1'}", "is no base URL"),
        ("{base_url: 'https://x/v1', api_key_env: UNSET_HERE}", "variable UNSET_HERE is not set"),
        ("{base_url: 'https://x/v1', api_key_file: nowhere.key}", "there is no file"),
        ("{base_url: 'https://x/v1', api_key_env: SOME_KEY, api_key_file: rig.yaml}", "keep one"),
        ("{base_url: 'https://x/v1', price_of: openai/gpt-4o}", "what costs money has a budget"),
        ("{base_url: 'https://x/v1', budget_usd: 1.0}", "what costs money has a budget"),
        ("{base_url: 'https://x/v1', treads: 4}", "unknown key; known: name, engine, base_url"),
        ("{base_url: 'https://x/v1', quantization: Q8_0}", "models[0].quantization: unknown key"),
        ("{}", "models[0].base_url: this key is required"),
    ],
)
def test_mistakes_in_remotes(tmp_path: Path, model: str, expected: str) -> None:
    inner = model[1:-1]
    text = f"models:\n  - {{name: m, engine: remote{', ' if inner else ''}{inner}}}\n"
    told = problem(tmp_path, text)
    assert expected in told
    assert "<remote>" not in told


def test_an_unknown_engine_is_told_all_there_are(tmp_path: Path) -> None:
    told = problem(tmp_path, "models:\n  - {name: m, engine: remot, source: x}\n")
    assert (
        "expected one of llama_cpp, llama_server, vllm, remote; got 'remot'; did you mean 'remote'?"
        in told
    )


def test_the_guides_examples_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("RIG2_KEY", "secret")
    (tmp_path / "chat.gguf").touch()
    (tmp_path / "next.gguf").touch()
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    configs = [load(tmp_path, block) for block in blocks]
    assert len(configs) >= 3
    assert all(config.routes for config in configs)
