"""An engine never outlives its supervisor, and its end is passed on."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from serving.engines import guard
from tests.processes import wait_for

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"


def start(code: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", guard.__file__, sys.executable, "-c", code]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def running(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    children: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return children


def test_the_exit_code_is_passed_on() -> None:
    assert start("raise SystemExit(3)").wait(10) == 3
    assert start("import os; os.kill(os.getpid(), 9)").wait(10) == 128 + 9


@pytest.mark.parametrize("code", [SLEEP, PARENT])
def test_a_closed_pipe_ends_the_engine_and_its_children(code: str) -> None:
    process = start(code)
    children = running(process)
    if code == PARENT:
        wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 2, "both run")
        children = psutil.Process(process.pid).children(recursive=True)
    assert process.stdin is not None
    process.stdin.close()
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert process.wait(10) == 128 + signal.SIGTERM


def test_sigterm_is_passed_on() -> None:
    process = start(SLEEP)
    children = running(process)
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_a_stopped_engine_ends_no_later_than_others() -> None:
    process = start(SLEEP)
    [engine] = running(process)
    engine.suspend()
    process.terminate()
    assert process.wait(guard.GRACE_SECONDS - 1) == 128 + signal.SIGTERM


def test_an_engine_that_ignores_sigterm_is_killed() -> None:
    process = start(STUBBORN)
    children = running(process)
    process.terminate()
    assert process.wait(guard.GRACE_SECONDS + 10) == 128 + signal.SIGKILL
    assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels offer nothing for it")
def test_an_engine_dies_with_a_guard_that_is_killed() -> None:
    process = start(SLEEP)
    children = running(process)
    process.kill()
    process.wait(10)
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_ctrl_c_in_the_terminal_is_the_supervisors_business() -> None:
    process = start(SLEEP)
    running(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    process.wait(10)
