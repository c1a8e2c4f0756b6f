"""Runs one engine and makes sure that it never outlives rigserve, even when rigserve is killed.

``python guard.py COMMAND...``: the supervisor holds the other end of stdin. When that closes, however
the supervisor ended, the engine and all its children are stopped. SIGTERM stops them too. Exits with the
engine's exit code, or 128 + N if signal N ended it. Uses the standard library only, and no ``serving`` import:
it stays small beside engines that count their memory.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 10.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def main(command: list[str]) -> int:
    """Run ``command`` to its end in a session of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Before the engine exists: a signal that comes while it is being started must not be lost on it.
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # Safe here: this process has no other thread yet.
        preexec_fn=_die_with_guard if sys.platform == "linux" else None,  # noqa: PLW1509
    )

    def watch_supervisor() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        stopping.set()

    def stop_when_asked() -> None:
        stopping.wait()
        _signal_group(child.pid, signal.SIGTERM)
        _signal_group(child.pid, signal.SIGCONT)  # a stopped process does not see the other
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(child.pid, signal.SIGKILL)

    for work in (watch_supervisor, stop_when_asked):
        threading.Thread(target=work, daemon=True).start()
    code = child.wait()
    # Helpers the engine started (tensor-parallel workers, say) are in its session and must go too.
    _signal_group(child.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _die_with_guard() -> None:
    """Run in the child: should the guard itself be killed, the kernel kills the engine (on Linux)."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
