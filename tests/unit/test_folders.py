"""Folders of data and of prepared weights are their owner's only, whoever makes them first."""

from __future__ import annotations

import stat
from pathlib import Path

from serving.engines.vllm.environment import Environments
from serving.folders import make_private
from serving.tuning.journal import Journal


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_those_above_are_private_too(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    folder = tmp_path / "cache" / "adapters"
    for _ in range(2):
        make_private(folder)
        assert [mode(each) for each in (folder, folder.parent, tmp_path)] == [0o700, 0o700, 0o755]


def test_what_is_made_within_the_data_folder_does_not_open_it(tmp_path: Path) -> None:
    Environments(tmp_path / "installed").make_folder()
    Journal(tmp_path / "tuned" / "tune" / "m.jsonl")
    assert [mode(tmp_path / each) for each in ("installed", "tuned")] == [0o700, 0o700]
