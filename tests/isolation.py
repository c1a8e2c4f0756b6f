"""A rig where no packet finds a way out: ``python -m tests.isolation CONFIG MODEL ADAPTER``, in a network namespace of its own.

Prints JSON: how often something tried to reach another machine while the rig started and worked, and whether such
a try is seen at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import requests

from tests.processes import RigServer

# linux/sockios.h, linux/if.h
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1
# A vLLM takes its time.
_START_SECONDS = 600.0
# For documentation (RFC 5737, RFC 3849); nobody has them.
_FAR = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def bring_up_loopback() -> None:
    """A new namespace has a loopback interface, which is down, and no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def interfaces() -> list[str]:
    """The network interfaces of this namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return [line.partition(":")[0].strip() for line in lines]


def tries() -> int:
    """How many packets, TCP's, UDP's and so DNS's too, the kernel had no way for, since the namespace is there."""
    names, values = (
        line.split()
        for line in Path("/proc/self/net/snmp").read_text().splitlines()
        if line.startswith("Ip:")
    )
    six = dict(line.split() for line in Path("/proc/self/net/snmp6").read_text().splitlines())
    return int(dict(zip(names, values, strict=True))["OutNoRoutes"]) + int(six["Ip6OutNoRoutes"])


def try_to_get_out() -> None:
    """By TCP and UDP, IPv4 and IPv6."""
    for family, address in _FAR:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as far:
                far.connect((address, 53))


def main(config_path: Path, model: str, adapter: Path) -> dict[str, Any]:
    """Serve, and use what is served."""
    bring_up_loopback()
    before = tries()
    with RigServer(config_path) as rig:
        rig.wait_until_ready(_START_SECONDS)
        body = {"name": "tuned", "model": model, "path": str(adapter)}
        requests.post(f"{rig.base_url}/admin/adapters", json=body, timeout=60).raise_for_status()
        answers = [
            rig.client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=4
            )
            for name in (model, "tuned")
        ]
        for path in ("/metrics", "/v1/models", "/docs"):
            rig.get(path).raise_for_status()
        rig.stop()
    tried = tries() - before
    try_to_get_out()
    return {
        "interfaces": interfaces(),
        "tokens": [answer.usage.completion_tokens for answer in answers if answer.usage],
        "tried": tried,
        "seen": tries() - before - tried,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
