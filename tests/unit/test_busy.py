"""Whose the processors' time was."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from serving.hardware.busy import Others
from tests.processes import wait_for

SPINS = "print('up', flush=True)\nwhile True: pass"


def stat(folder: Path, cpu: str, **processes: tuple[int, int]) -> None:
    """A proc file system: ticks of all processors, and (user, system) of processes, children of process 1."""
    (folder / "stat").write_text(f"cpu  {cpu}\ncpu0 1 2 3\n")
    for name, (user, system) in processes.items():
        process = folder / name.removeprefix("p")
        process.mkdir(exist_ok=True)
        before = "S 1 0 0 0 0 0 0 0 0 0"
        (process / "stat").write_text(f"{process.name} (a) b) {before} {user} {system} 0 0 20\n")


def test_ours_is_taken_off_and_what_a_hypervisor_kept_counts(tmp_path: Path) -> None:
    stat(tmp_path, "100 0 100 800 0 0 0 0 0 0", p7=(50, 20))
    others = Others(7, tmp_path)
    # 500 ticks: 300 idle, 20 of them waiting for a disk; 150 busy, of which 110 were ours; 50 were stolen.
    stat(tmp_path, "240 0 110 1080 20 0 0 50 99 0", p7=(150, 30))
    assert others.share() == (150 + 50 - 110) / 500
    assert Others(7, tmp_path).share() is None  # no time has passed
    assert Others(7, tmp_path / "nothing").share() is None


def test_a_program_of_ours_is_not_another() -> None:
    with subprocess.Popen([sys.executable, "-c", SPINS], stdout=subprocess.PIPE) as spinner:
        assert spinner.stdout is not None
        spinner.stdout.readline()
        ours, theirs = Others(spinner.pid), Others(1 << 30)
        time.sleep(0.5)
        wait_for(lambda: (theirs.share() or 0.0) > 0.05, "its time counts as another's", 60)
        first, second = ours.share(), theirs.share()
        spinner.kill()
    assert first is not None
    assert second is not None
    assert first < second
