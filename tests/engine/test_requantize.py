"""Prepared copies of the real model: made once, whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serving.models.gguf import read_header
from serving.models.requantize import prepare
from serving.models.sources import ModelError, resolve
from tests.conftest import SOURCE
from tests.processes import wait_for

PREPARE = "import sys; from pathlib import Path; from serving.models.requantize import prepare;"
PREPARE += "print(prepare(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))"


def start(
    cache: Path, quantization: str = "Q4_0", stderr: int | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(resolve(SOURCE)), quantization, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


def test_two_processes_prepare_one_file(tmp_path: Path) -> None:
    processes = [start(tmp_path), start(tmp_path)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs[0] == outputs[1]
    assert list(tmp_path.glob("*.gguf")) == [Path(outputs[0])]
    assert not list(tmp_path.glob("*.partial"))
    # Q4_0 takes less room than the shipped Q4_1.
    assert 50_000_000 < Path(outputs[0]).stat().st_size < resolve(SOURCE).stat().st_size
    assert read_header(Path(outputs[0])).file_type == 2  # LLAMA_FTYPE_MOSTLY_Q4_0
    made_at = Path(outputs[0]).stat().st_mtime_ns
    (memo,) = tmp_path.glob("*.sha256")
    remembered_at = memo.stat().st_mtime_ns
    assert prepare(resolve(SOURCE), "Q4_0", tmp_path) == Path(outputs[0])
    assert memo.stat().st_mtime_ns == remembered_at, "the file is not read again"
    memo.write_text("")  # as a crash may leave it
    assert prepare(resolve(SOURCE), "Q4_0", tmp_path) == Path(outputs[0])
    assert Path(outputs[0]).stat().st_mtime_ns == made_at


def test_a_process_killed_half_way_leaves_no_half_file(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("*.partial")), "the work begins")
    children = psutil.Process(process.pid).children()
    for victim in (process.pid, *(child.pid for child in children)):
        os.kill(victim, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("*.gguf"))
    prepared = prepare(resolve(SOURCE), "Q4_0", tmp_path)
    assert prepared.stat().st_size > 50_000_000
    assert not list(tmp_path.glob("*.partial"))


def test_the_work_ends_with_the_process_that_asked_for_it(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for(lambda: list(tmp_path.glob("*.partial")), "the work begins")
    workers = psutil.Process(process.pid).children()
    assert workers
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(workers, timeout=5)[1]
    assert not list(tmp_path.glob("*.gguf"))


def test_without_a_quantization_the_source_is_served_as_it_is(tmp_path: Path) -> None:
    assert prepare(resolve(SOURCE), None, tmp_path) == resolve(SOURCE)
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_a_clear_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(resolve(SOURCE).read_bytes()[:100_000])
    with pytest.raises(ModelError, match=r"cannot use .*broken\.gguf: it ends early"):
        prepare(broken, "Q8_0", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.gguf*.partial"))


def test_a_source_of_the_asked_type_needs_no_copy(tmp_path: Path) -> None:
    assert prepare(resolve(SOURCE), "Q4_1", tmp_path) == resolve(SOURCE)
    assert not list(tmp_path.iterdir())


def test_weights_cut_in_the_middle_are_a_clear_error(tmp_path: Path) -> None:
    """The header's look does not see the end of the last tensor; llama.cpp does."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(resolve(SOURCE).read_bytes()[:-1_000])
    with pytest.raises(ModelError, match=r"cannot requantize .*broken\.gguf to Q8_0: .+"):
        prepare(broken, "Q8_0", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.gguf*"))


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stops the writing as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, hard))
    try:
        with pytest.raises(ModelError, match=r"cannot requantize .*Q8_0: .*iostream error"):
            prepare(resolve(SOURCE), "Q8_0", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_crash_of_the_child_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, stderr=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.glob("*.partial")), "the work begins")
    for child in psutil.Process(process.pid).children():
        child.kill()
    assert "was killed by SIGKILL" in process.communicate(timeout=60)[1]
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"storage\.cache_dir"):
        prepare(resolve(SOURCE), "Q8_0", tmp_path / "file" / "cache")
