"""The machine's memory, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from serving.hardware.memory import (
    family_of,
    host_available_mib,
    host_free_mib,
    host_total_mib,
    resident_mib,
)

_HOLDS_64_MIB = "block = b'x' * 2**26; print('up', flush=True); input()"


def write_group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    """A control group's files, as the kernel writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_anon 7\n{names[2]} {cached}\n")


def proc_in(folder: Path, line: str) -> Path:
    """A proc file system of a process in a group, on a machine with 4 GiB free."""
    (folder / "self").mkdir(parents=True)
    (folder / "self" / "cgroup").write_text(line)
    (folder / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    return folder


WHOLE_MIB = psutil.virtual_memory().total // 2**20


def test_without_a_limit_all_of_the_machine_counts(tmp_path: Path) -> None:
    assert host_total_mib(tmp_path, tmp_path) == WHOLE_MIB
    proc = proc_in(tmp_path / "proc", "0::/\n")
    for limit in ("max", str(2**60)):
        write_group(tmp_path, 2, limit, 0, 0)
        assert host_total_mib(tmp_path, proc) == WHOLE_MIB


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """Within a container the root is its own; it may not see where it is from outside."""
    for line in ("0::/\n", "0::/docker/0123\n"):
        proc = proc_in(tmp_path / line.replace("/", "_").strip(), line)
        write_group(tmp_path, 2, str(100 * 2**20), 70 * 2**20, 30 * 2**20)
        assert host_total_mib(tmp_path, proc) == 100
        assert host_available_mib(tmp_path, proc) == 60


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    proc = proc_in(tmp_path / "proc", "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n")
    write_group(tmp_path / "memory", 1, str(2**63 - 4096), 0, 0)
    assert host_total_mib(tmp_path, proc) == WHOLE_MIB
    write_group(tmp_path / "memory" / "docker" / "x", 1, str(200 * 2**20), 50 * 2**20, 10 * 2**20)
    assert host_total_mib(tmp_path, proc) == 200
    assert host_available_mib(tmp_path, proc) == 160


def test_the_tightest_of_all_groups_above_counts(tmp_path: Path) -> None:
    proc = proc_in(tmp_path / "proc", "0::/user.slice/rig.service\n")
    write_group(tmp_path / "user.slice", 2, str(300 * 2**20), 290 * 2**20, 0)
    write_group(tmp_path / "user.slice" / "rig.service", 2, str(500 * 2**20), 20 * 2**20, 0)
    assert host_total_mib(tmp_path, proc) == 300
    assert host_available_mib(tmp_path, proc) == 10
    assert host_free_mib(0, tmp_path, proc) == 10
    assert host_free_mib(200, tmp_path, proc) == 210
    assert host_free_mib(400, tmp_path, proc) == 300


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
