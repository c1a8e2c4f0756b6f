"""What the commands print for an operator fits a terminal of 80 columns, and nothing of it is cut."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from serving.admin.commands import table_of
from serving.keys.key import Allowance, Key
from serving.keys.render import keys_table

NOW_UNIX = 1_800_000_000.0


def shown(table: Table, width: int) -> list[str]:
    output = StringIO()
    Console(file=output, width=width).print(table)
    return output.getvalue().splitlines()


def model(name: str, **told: Any) -> dict[str, Any]:
    memory = {"source": "estimated", "needed_mib": {"cpu": 350, "gpu": 0}, "reserved_mib": {}}
    return {
        "id": name,
        "state": "unloaded",
        "engine": "llama_cpp",
        "devices": [],
        "memory": memory,
        "in_flight": 0,
        "waiting": 0,
        "idle_seconds": None,
        "pinned": False,
        "ttl_seconds": None,
    } | told


def test_models_fit_80_columns() -> None:
    reserved = {"gpu:0": 12345, "cpu": 678}
    measured = {"source": "measured", "needed_mib": reserved, "reserved_mib": reserved}
    busy = {"devices": ["gpu:0", "cpu"], "memory": measured, "in_flight": 16, "waiting": 256}
    table = table_of(
        [
            model("smollm2-135m", idle_seconds=4000.0, ttl_seconds=600.0),
            model("org/a-rather-long-model-name-Q4_K_M", state="ready", pinned=True, **busy),
        ]
    )
    lines = shown(table, 80)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    first = lines[1].split()
    assert first == [
        "smollm2-135m",
        "unloaded",
        "-",
        "~350",
        "MiB",
        "0",
        "0",
        "67m",
        "10m",
    ]
    names = "".join(line.partition("  ")[0] for line in lines[2:])
    assert names == "org/a-rather-long-model-name-Q4_K_M"
    assert "12345+678 MiB" in lines[2]
    # Where there is room, a model is a line.
    assert len(shown(table, 160)) == 3


@pytest.mark.parametrize("width", [80, 200])
def test_keys_fit_80_columns(width: int) -> None:
    everything = Allowance(60, 20_000, 2, 5.0, 1_000_000, "day")
    moments: Any = {"created_at": NOW_UNIX, "last_used_at": NOW_UNIX}
    table = keys_table(
        [
            Key("key-1", "alice", "alice", 1.0, "interactive", None, Allowance(), True, **moments),
            Key(
                *("key-2", "ci-of-the-research-team", "research", 2.5, "batch"),
                *(("smollm2-135m", "org/tuned"), everything, False),
                **moments,
            ),
        ],
        NOW_UNIX,
    )
    lines = shown(table, width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for each in ("60 req/min", "20,000 tok/min", "2 at once", "$5/day", "1,000,000 tok/day"):
        assert each in text
    assert lines[1].startswith("alice")
    for each in ("(admin)", "active", "weight 2.5", "batch", "smollm2-135m", "org/tuned", "08:00"):
        assert each in text
