"""Runs one container and makes sure that it does not outlive rigserve: to end the program that runs it does not end it.

``python container_guard.py RUNTIME WORDS...``: as ``RUNTIME run WORDS...``, under a name that says whose the container is. SIGTERM
stops it, for good if it takes too long. What one that was killed has left behind, the next one removes first. Exits as the
runtime does. Uses the standard library only, and no ``serving`` import.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading

# Less than serving.engines.guard waits before it kills this.
GRACE_SECONDS = 7.0

_ASK_SECONDS = 60.0


def main(runtime: str, words: list[str], grace_seconds: float = GRACE_SECONDS) -> int:
    """Run the container to its end."""
    # Before there is a container: a signal that comes while it is being started must not be lost on it.
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    remove_left_behind(runtime)
    name = f"rigserve-{os.getpid()}-{secrets.token_hex(4)}"
    child = subprocess.Popen([runtime, "run", "--name", name, *words])

    def stop_when_asked() -> None:
        stopping.wait()
        # The whole session has the signal, and the runtime passes it on.
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(signal.SIGTERM)
        try:
            child.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            _ask(runtime, "rm", "--force", name)

    threading.Thread(target=stop_when_asked, daemon=True).start()
    code = child.wait()
    return code if code >= 0 else 128 - code


def remove_left_behind(runtime: str) -> None:
    """Remove the containers whose guards are gone."""
    for name in _ask(runtime, "ps", "--all", "--format", "{{.Names}}").split():
        found = re.fullmatch(r"rigserve-(\d+)-[0-9a-f]{8}", name)
        if found and not _is_guard(found[1]):
            print(f"removing the container {name}, which was left behind", flush=True)
            _ask(runtime, "rm", "--force", name)


def _is_guard(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.path.basename(__file__).encode() in file.read()
    except OSError:
        return False


def _ask(runtime: str, *words: str) -> str:
    try:
        asked = subprocess.run(
            [runtime, *words], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{runtime} {words[0]}: {error}", flush=True)
        return ""
    return asked.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
