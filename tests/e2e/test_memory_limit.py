"""A rig in a control group, as in a container: what `config check` lets pass there fills its slots, and lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.models.sources import resolve
from tests.tiny_models import write_wide_cache
from tools.control_group import NoControlGroup
from tools.memory_trial import EMBEDDED, WIDE, Case, run_case

# The other cases: python -m tools.memory_trial
CASE = Case(
    "many slots",
    1024,
    {"context_length": 512, "prefix_cache_mib": 0, "threads": 1},
    "max_sequences",
    1,
    WIDE,
)


def test_the_most_slots_that_pass_can_all_be_filled(tmp_path: Path) -> None:
    model = write_wide_cache(tmp_path / "wide.gguf", resolve(EMBEDDED))
    try:
        outcome = run_case(CASE, {WIDE: str(model)})
    except NoControlGroup as reason:
        pytest.skip(f"NO CONTROL GROUPS: limits of memory are not tested; {reason}")
    assert outcome.problems == ()
    assert outcome.kills == 0
    # So tight that it was a trial: what is kept free is for the gateway alone.
    assert outcome.said_mib > CASE.limit_mib - CASE.reserve_mib - 40
    assert outcome.engine_mib > 0.6 * outcome.said_mib
    assert outcome.tokens > 4 * 512
