"""What an engine declares, it does; what it lacks is refused by name, never ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.engines import ENGINES, ContractServer
from tests.contract.probes import PROBES


@pytest.mark.parametrize("capability", PROBES)
def test_what_is_asked_for_is_done_or_refused_by_name(
    contract: ContractServer, capability: str
) -> None:
    probe = PROBES[capability]
    answer = contract.post(probe.path, **probe.body)
    if capability in contract.engine.capabilities:
        assert answer.status_code == 200, answer.text
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["code"]
    if probe.param is not None:
        params = probe.param if isinstance(probe.param, tuple) else (probe.param,)
        assert error["param"] in params


def test_engines_declare_what_there_are_probes_for() -> None:
    for engine in ENGINES:
        assert engine.capabilities <= PROBES.keys()


def test_the_guide_tells_what_each_engine_can() -> None:
    """Each cell is what the test above has seen: done, or a 400 that names the field."""
    lines = ["| | " + " | ".join(f"`{engine.name}`" for engine in ENGINES) + " |"]
    lines.append("|---" * (len(ENGINES) + 1) + "|")
    for name in PROBES:
        cells = ("yes" if name in engine.capabilities else "400" for engine in ENGINES)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    guide = Path(__file__).parents[2] / "docs" / "engines.md"
    assert table in guide.read_text(encoding="utf-8"), f"docs/engines.md is to hold:\n{table}"
