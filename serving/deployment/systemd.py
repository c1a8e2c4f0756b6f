"""systemd's units: the server may do what it must, and its socket outlives it."""

from __future__ import annotations

from pathlib import Path

# NVIDIA's devices by their names in /proc/devices; WSL 2 has one of its own.
_GPU_DEVICES = "DevicePolicy=closed\nDeviceAllow=char-nvidia* rw\nDeviceAllow=/dev/dxg rw\n"
_NO_DEVICES = "PrivateDevices=yes\n"

_SERVICE = """\
[Unit]
Description=rigserve: LLMs behind an OpenAI-compatible API
After=network-online.target
Wants=network-online.target
Requires=rigserve.socket

[Service]
ExecStart={program} serve {config}
ExecReload=/bin/kill -HUP $MAINPID
User=rigserve
StateDirectory=rigserve
StateDirectoryMode=0700
CacheDirectory=rigserve
Environment=HOME=/var/lib/rigserve HF_HOME=/var/cache/rigserve/huggingface
Restart=on-failure
RestartSec=2
# Streams in flight have server.drain_timeout_seconds to finish; then engines have to end.
KillMode=mixed
TimeoutStopSec=60
LimitNOFILE=65536

# It reads its config and models, and writes to its state and cache.
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes
UMask=0077
{devices}NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# Not MemoryDenyWriteExecute: CUDA and vLLM write machine code when they run.

[Install]
WantedBy=multi-user.target
"""

_SOCKET = """\
[Unit]
Description=rigserve's socket: connections wait in it while the server restarts

[Socket]
ListenStream={listen}
Backlog=2048

[Install]
WantedBy=sockets.target
"""


def service(program: Path, config: Path, *, has_gpu: bool) -> str:
    """The service. Homes are hidden from it, unless the program is in one."""
    return _SERVICE.format(
        program=program,
        config=config,
        home="read-only" if is_at_home(program) else "yes",
        devices=_GPU_DEVICES if has_gpu else _NO_DEVICES,
    )


def is_at_home(path: Path) -> bool:
    """Whether a path is in a place that the service does not see: somebody's home."""
    return any(path.is_relative_to(home) for home in ("/home", "/root", "/run/user"))


def socket(listen: str) -> str:
    """The socket, at ADDRESS:PORT."""
    return _SOCKET.format(listen=listen)
