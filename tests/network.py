"""Two machines and a cable between them: network namespaces of Linux, which see nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Of a block that is for benchmarks of networks (RFC 2544).
ADDRESSES = ("198.18.0.1", "198.18.0.2")


@contextmanager
def two_machines() -> Iterator[tuple[list[str], list[str]]]:
    """How to run a command on each; their addresses are :data:`ADDRESSES`. Skips the test where it may not be."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("NOT TESTED: unshare, nsenter and ip are needed (util-linux, iproute2)")
    root = os.geteuid() == 0
    with _held(["unshare", *([] if root else ["--map-root-user"]), "--net"]) as first:
        users = [] if root else ["--user", "--preserve-credentials"]
        here = ["nsenter", f"--target={first}", *users, "--net"]
        with _held([*here, "unshare", "--net"]) as second:
            there = ["nsenter", f"--target={second}", *users, "--net"]
            cable = ["type", "veth", "peer", "name", "far", "netns", str(second)]
            _run([*here, "ip", "link", "add", "near", *cable])
            for machine, device, address in zip(
                (here, there), ("near", "far"), ADDRESSES, strict=True
            ):
                _run([*machine, "ip", "link", "set", "lo", "up"])
                _run([*machine, "ip", "address", "add", f"{address}/24", "dev", device])
                _run([*machine, "ip", "link", "set", device, "up"])
            yield here, there


@contextmanager
def _held(command: list[str]) -> Iterator[int]:
    """A process that lives in the namespaces that a command makes, so that they are there."""
    script = "echo $$; exec cat"
    with subprocess.Popen(
        [*command, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        told = holder.stdout.readline()
        if not told:
            pytest.skip("NOT TESTED: network namespaces are not to be had here (unshare -rn)")
        try:
            yield int(told)
        finally:
            holder.stdin.close()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
