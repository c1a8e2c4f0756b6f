"""The machine's memory, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from serving.hardware.memory import family_of, host_total_mib, resident_mib

_HOLDS_64_MIB = "block = b'x' * 2**26; print('up', flush=True); input()"


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    whole_mib = psutil.virtual_memory().total // 2**20
    limit = tmp_path / "memory.max"
    for text, expected in (("max\n", whole_mib), ("104857600\n", 100), (f"{2**60}\n", whole_mib)):
        limit.write_text(text)
        assert host_total_mib(limit) == expected
    assert host_total_mib(tmp_path / "nothing") == whole_mib


def test_what_a_process_and_its_children_hold() -> None:
    holder = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_HOLDS_64_MIB!r}])"
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        family = family_of(process.pid)
        assert len(family) == 2
        assert process.pid in family
        assert 64 < resident_mib(family) < 64 + 100
        assert family < family_of(os.getpid())
        process.stdin.close()
    assert resident_mib(family) == 0
