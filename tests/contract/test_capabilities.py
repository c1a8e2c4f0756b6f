"""What an engine declares, it does; what it lacks is refused by name, never ignored."""

from __future__ import annotations

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
        assert error["param"] == probe.param


def test_engines_declare_what_there_are_probes_for() -> None:
    for engine in ENGINES:
        assert engine.capabilities <= PROBES.keys()
