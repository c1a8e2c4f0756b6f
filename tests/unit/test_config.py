"""A configuration is loaded, or everything wrong with it is said: where, what was expected, the mend."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from serving.config import (
    Config,
    ConfigError,
    FiltersConfig,
    LlamaCppModel,
    config_json_schema,
    load_config,
)

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"
GOOD = """\
server:
  port: 8001
models:
  - name: small
    engine: llama_cpp
    source: hf://org/repo/file.gguf
    quantization: Q8_0
"""


def load(tmp_path: Path, text: str | bytes) -> Config:
    path = tmp_path / "rig.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path)


def problem(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_the_default_config_loads_and_shows_every_key() -> None:
    config = load_config(DEFAULT)
    assert config.local_models[0].quantization == "Q8_0"
    assert len(config.cost.compare_to) >= 10
    written = yaml.safe_load(DEFAULT.read_text())
    sections: list[tuple[type[BaseModel], Any]] = [
        (Config, written),
        (LlamaCppModel, written["models"][0]),
        (FiltersConfig, written["models"][0]["filters"]),
        *(
            (type(getattr(config, key)), written[key])
            for key in (
                "server",
                "storage",
                "logging",
                "tracing",
                "memory",
                "scaling",
                "cluster",
                "cost",
            )
        ),
        (type(config.cost.power), written["cost"]["power"]),
        (type(config.cost.ranges), written["cost"]["ranges"]),
    ]
    for model, keys in sections:
        assert set(keys) == set(model.model_fields)


def test_every_key_of_the_default_config_is_explained() -> None:
    lines = DEFAULT.read_text().splitlines()
    explained_by_section = ("hardware_price_usd", "lifetime_years", "idle_watts", "load_watts")
    for above, line in itertools.pairwise(lines):
        key, colon, _ = line.strip().removeprefix("- ").partition(":")
        is_key = bool(colon) and key.isidentifier() and line.startswith(" ")
        if is_key and not key.startswith(explained_by_section):
            assert "#" in line or above.strip().startswith("#") or "_usd" in key, line


def test_the_schema_accepts_the_default_config() -> None:
    schema = config_json_schema()
    assert json.loads(json.dumps(schema)) == schema
    values = yaml.safe_load(DEFAULT.read_text().replace("${RIGSERVE_PORT:-8000}", "8000"))
    jsonschema.validate(values, schema)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  port: 8001", "  prot: 8001", "rig.yaml:2: server.prot: unknown key; did you mean 'port'?"),
        ("quantization", "quantisation", "rig.yaml:7: models[0].quantisation: unknown key; did you mean 'quantization'?"),
        ("Q8_0", "q8_0", "rig.yaml:7: models[0].quantization: expected one of"),
        ("Q8_0", "q8_0", "did you mean 'Q8_0'?"),
        ("8001", "many", "rig.yaml:2: server.port: expected a whole number; got 'many'"),
        ("8001", "70000", "rig.yaml:2: server.port:"),
        ("    source: hf://org/repo/file.gguf\n", "", "models[0].source: this key is required"),
        ("hf://org/repo/file.gguf", "gone.gguf", "rig.yaml:6: models[0].source: there is no file"),
        ("hf://org", "s3://org", "rig.yaml:6: models[0].source: expected a path"),
        ("llama_cpp", "lama_cpp", "did you mean 'llama_cpp'?"),
        ("Q8_0", "Q8_0\n    aliases: [a, small]", "rig.yaml:8: models[0].aliases[1]: the name 'small' is taken"),
        ("Q8_0", "Q8_0\n    port: 8001", "rig.yaml:8: models[0].port: port 8001 is taken by server.port"),
        ("Q8_0", "Q8_0\n    max_sequences: 0", "rig.yaml:8: models[0].max_sequences:"),
        ("Q8_0", "Q8_0\n    name: again", "rig.yaml:8: models[0].name: this key stands here twice, first on line 4"),
        ("8001", "${NOT_SET_ANYWHERE}", "rig.yaml:2: server.port: the environment variable NOT_SET_ANYWHERE is not set"),
        ("Q8_0", "Q8_0\ncost:\n  compare_to: [gpt]", "rig.yaml:9: cost.compare_to: 'gpt' is not of the form"),
        ("Q8_0", "Q8_0\ncost:\n  power: {idle_watts: 9, load_watts: 3}", "below idle_watts"),
        ("Q8_0", "Q8_0\ncost:\n  resale_usd: 900", "resale_usd (900) is above hardware_price_usd (800)"),
        ("Q8_0", "Q8_0\ncost:\n  hardware_price_usd: 729 EUR", "hardware_price_usd: '729 EUR': currencies has no rate for EUR"),
        ("Q8_0", "Q8_0\ncost:\n  currency: EUR", "currency: EUR has no rate; add it to currencies"),
        ("Q8_0", "Q8_0\ncost:\n  currencies: {euro: 1.1}", "no rate; write a code of three letters"),
        ("Q8_0", "Q8_0\ncost:\n  ranges: {utilization: [0.3, 0.5]}", "must be the least and the most, and hold 0.25"),
        ("Q8_0", "Q8_0\ncost:\n  ranges: {utilization: [0.1, 1.5]}", "no more than 1 is possible"),
        ("Q8_0", "Q8_0\ncost:\n  tariff: [{begin: '25:00', end: '06:00', usd_per_kwh: 1}]", "no time of day"),
        ("Q8_0", "Q8_0\ncost:\n  power: {meter: {kind: shelly, url: 'http://a', query: up}}", "a query go together"),
        ("Q8_0", "Q8_0\n    filters: {force: {seed: 1}}", "rig.yaml:8: models[0].filters.force: unknown key; did you mean 'forced'?"),
        ("Q8_0", "Q8_0\n    filters: {max_tokens_default: 9, max_tokens_ceiling: 8}", "rig.yaml:8: models[0].filters: max_tokens_default (9) is above"),
        ("models:", "models: {", "rig.yaml:"),
    ],
)  # fmt: skip
def test_a_mistake_is_shown_with_its_place_and_mend(
    tmp_path: Path, old: str, new: str, expected: str
) -> None:
    assert old in GOOD
    assert expected in problem(tmp_path, GOOD.replace(old, new, 1))


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = problem(tmp_path, GOOD.replace("8001", "x").replace("Q8_0", "Q9").replace("name", "nam"))
    assert len(text.splitlines()) == 4  # port, quantization, the unknown key, and the missing one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it is empty"),
        ("- a\n", "at the top level"),
        ("just words", "at the top level"),
        (b"server: \xff", "not UTF-8"),
        ("models: []", "models"),
        ("a: [1, 2", "not valid YAML"),
        ("a: !!python/object:os.system {}", "unknown key"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert expected in problem(tmp_path, text)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)


def test_environment_variables_stand_in_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIG_PORT", "9005")
    monkeypatch.setenv("RIG_NAME", "77")
    text = GOOD.replace("8001", "${RIG_PORT}").replace("small", '"${RIG_NAME}"')
    text = text.replace("Q8_0", "${RIG_TYPE:-Q4_0}") + "storage:\n  data_dir: ~/${RIG_NAME}/$${x}\n"
    config = load(tmp_path, text)
    assert config.server.port == 9005
    assert config.local_models[0].name == "77"
    assert config.local_models[0].quantization == "Q4_0"
    assert config.storage.data_dir == str(Path("~/77/${x}").expanduser())


def test_model_paths_are_relative_to_the_config(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    more = "projector: m.gguf, draft_model: small.gguf, speculation: draft_model"
    config = load(tmp_path, f"models: [{{name: m, source: m.gguf, {more}}}]\n")
    [model] = config.local_models
    assert isinstance(model, LlamaCppModel)
    assert model.source == model.projector == str(tmp_path / "m.gguf")
    assert model.draft_model == str(tmp_path / "small.gguf")


def test_a_quantized_cache_needs_its_kernel(tmp_path: Path) -> None:
    more = "kv_type: Q8_0, flash_attention: false"
    with pytest.raises(ConfigError, match="kv_type Q8_0 needs flash_attention: true"):
        load(tmp_path, f"models: [{{name: m, source: package://a/m.gguf, {more}}}]\n")
