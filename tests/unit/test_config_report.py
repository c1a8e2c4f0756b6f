"""The whole report on a bad configuration: every problem, in the order of the lines, in plain words."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.config import Config, ConfigError, load_config
from serving.cost.prices import PriceBook

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"

BASE = "models:\n  - name: m\n    source: package://p/f.gguf\n"


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "rig.yaml"
    path.write_text(text)
    return load_config(path)


def report(tmp_path: Path, text: str) -> list[str]:
    """The lines of the report, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("    context_length: abc\n", "4: models[0].context_length: expected a whole number; got 'abc'"),
        ("    context_length: 4096.5\n", "4: models[0].context_length: expected a whole number; got 4096.5"),
        ("tracing: {endpoint: 'collector:4318'}\n", "4: tracing.endpoint: 'collector:4318' is no base URL, such as http://collector.example.org:4318; no user, query or fragment"),
        ("tracing: {endpoint: 'http://me:pw@collector'}\n", "4: tracing.endpoint: 'http://me:pw@collector' is no base URL, such as http://collector.example.org:4318; no user, query or fragment"),
        ("    context_length: '4096'\n", "4: models[0].context_length: expected a whole number; got '4096'; leave out the quotes"),
        ("    context_length: true\n", "4: models[0].context_length: expected a whole number; got true"),
        ("    context_length: [1, 2]\n", "4: models[0].context_length: expected a whole number; got a list of 2"),
        ("    context_length: 1\n", "4: models[0].context_length: expected at least 64; got 1"),
        ("    max_sequences: 999\n", "4: models[0].max_sequences: expected at most 256; got 999"),
        ("    start_timeout_seconds: 0\n", "4: models[0].start_timeout_seconds: expected more than 0.0; got 0"),
        ("    start_timeout_seconds: .inf\n", "4: models[0].start_timeout_seconds: expected a finite number; got inf"),
        ("    start_timeout_seconds: soon\n", "4: models[0].start_timeout_seconds: expected a number; got 'soon'"),
        ("    aliases: foo\n", "4: models[0].aliases: expected a list; got 'foo'"),
        ("    aliases: [ok, 1]\n", "4: models[0].aliases[1]: expected text; got 1; put it in quotes"),
        ("server:\n  allow_remote: maybe\n", "5: server.allow_remote: expected true or false; got 'maybe'"),
        ("server:\n", "4: server: expected keys and values; got nothing"),
        ("servr: {}\n", "4: servr: unknown key; did you mean 'server'?; known: server, models, routes, storage, logging, tracing, memory, scaling, cluster, cost"),
        ("    port: 8000\n", "4: models[0].port: port 8000 is taken by server.port; choose another, or leave it out for a free one"),
        ("storage:\n  cache_dir: ~no-such-user/x\n", "5: storage.cache_dir: there is no home folder for '~no-such-user/x'; write the path out"),
    ],
)  # fmt: skip
def test_one_mistake_makes_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert report(tmp_path, BASE + text) == [f"rig.yaml:{expected}"]


def test_an_empty_list_of_models_is_told_from_one_of_bad_models(tmp_path: Path) -> None:
    assert report(tmp_path, "models: []\n") == [
        "rig.yaml:1: models: expected a list with at least 1 entry; got a list of 0"
    ]
    assert report(tmp_path, "models: [foo]\n") == [
        "rig.yaml:1: models[0]: expected keys and values; got 'foo'"
    ]


def test_no_kind_of_problem_hides_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    second = (
        "  - name: m\n"  # 7: a name twice
        "    source: gone.gguf\n"  # 8: a missing file
        "    context_length: ${NOT_SET_ANYWHERE}\n"  # 9: a variable, and not its lack of a number
        "    gpu_layer: 1\n"  # 10: a wrong key
    )
    text = f"{BASE}    port: 9000\n    threads: 1\n    threads: 2\n{second}server:\n  port: 9000\n"
    assert [line.split(": ")[:2] for line in report(tmp_path, text)] == [
        ["rig.yaml:4", "models[0].port"],
        ["rig.yaml:6", "models[0].threads"],
        ["rig.yaml:7", "models[1].name"],
        ["rig.yaml:8", "models[1].source"],
        ["rig.yaml:9", "models[1].context_length"],
        ["rig.yaml:10", "models[1].gpu_layer"],
    ]


def test_folders_are_found_from_the_file_or_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load(tmp_path, BASE).storage.cache_dir == "/home/somebody/.cache/rigserve"
    config = load(tmp_path, BASE + "storage: {cache_dir: here, data_dir: ~/there}\n")
    assert config.storage.cache_dir == str(tmp_path / "here")
    assert config.storage.data_dir == "/home/somebody/there"


def test_two_engines_cannot_share_a_port(tmp_path: Path) -> None:
    text = f"{BASE}    port: 9000\n  - name: n\n    source: package://p/g.gguf\n    port: 9000\n"
    assert report(tmp_path, text) == [
        "rig.yaml:7: models[1].port: port 9000 is taken by models[0].port; "
        "choose another, or leave it out for a free one"
    ]


def test_every_model_the_default_compares_with_has_a_price() -> None:
    compare_to = load_config(DEFAULT).cost.compare_to
    assert len(compare_to) >= 12
    assert PriceBook(compare_to).references == compare_to
