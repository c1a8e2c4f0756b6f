"""What YAML allows and a configuration does not: it is reported like any other mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.config import ConfigError, load_config

BASE = "models:\n  - name: m\n    source: package://p/f.gguf\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "    port: !foo 3\n", ":4: models[0].port: the YAML tag !foo has no meaning here"),
        (BASE + "    port: !!int abc\n", ":4: models[0].port: cannot read the value 'abc'"),
        (BASE + "    engine: 2020-13-45\n", ":4: models[0].engine: cannot read the value"),
        (BASE + "    engine: ${1X}\n", ":4: models[0].engine: '${1X}' is no variable"),
        (BASE + "    engine: ${X\n", ":4: models[0].engine: '${X' is no variable"),
        ("models: &x [*x]\n", ":1: models[0]: this alias (*) stands inside its own anchor"),
        (f"server: &x {{host: *x}}\n{BASE}", ":1: server.host: this alias (*) stands inside"),
        (f"? [a, b]\n: 1\n{BASE}", ":1: a key must be a single word"),
        ("models: \x01\n", ": it is not text: it holds the control character 0x1"),
        ("- a\n", "at the top level; found a list"),
        ("hello\n", "at the top level; found a single value"),
    ],
)
def test_what_yaml_allows_and_a_config_does_not(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert expected in str(caught.value)


def test_after_a_double_key_the_first_value_counts_on_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text(BASE + "    port: 8000\n    port: 9001\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.line for problem in caught.value.problems] == [4, 5]


def test_a_variable_set_to_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTHING", "")
    path = tmp_path / "rig.yaml"
    path.write_text(f"{BASE}    threads: ${{NOTHING}}\n    port: ${{NOTHING:-9000}}\n")
    (model,) = load_config(path).local_models
    assert model.threads is None
    assert model.port == 9000
