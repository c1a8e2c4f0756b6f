"""Checks of what a config asks for: its folders, port, files, models, and who may read them."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from serving.config import Config, ModelConfig
from serving.doctor.finding import Finding, ok, problem, unchecked, warning
from serving.hardware.energy import ESTIMATED, open_meter
from serving.models.hub import HubSource
from serving.models.sources import ModelError, local_path

_GIB = 2**30
# A small model; and one that people want.
_LEAST_DISK_BYTES, _GOOD_DISK_BYTES = 1 * _GIB, 20 * _GIB
_OTHERS_MAY_READ = stat.S_IRGRP | stat.S_IROTH


def check_folders(config: Config) -> Iterator[Finding]:
    """Whether rigserve may write where it has to, there is room, and others cannot read it."""
    storage = config.storage
    for key, folder in (
        ("storage.data_dir", Path(storage.data_dir)),
        ("storage.cache_dir", Path(storage.cache_dir)),
        ("Downloads", Path(constants.HF_HUB_CACHE)),
    ):
        yield _folder(key, folder)
    yield from _private(Path(storage.data_dir))


def _folder(key: str, folder: Path) -> Finding:
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return problem(
            key,
            f"{folder} cannot be written to by this user",
            f"chown it to this user, or set another{f' {key}' if '.' in key else ' HF_HOME'}",
        )
    free_bytes = shutil.disk_usage(there).free
    says = f"{folder}, {free_bytes / _GIB:.0f} GiB free"
    if free_bytes < _LEAST_DISK_BYTES:
        return problem(key, says, "free disk space: rigserve models list shows what models take")
    if free_bytes < _GOOD_DISK_BYTES and key != "storage.data_dir":
        return warning(key, f"{says}: too little for larger models", "free disk space")
    return ok(key, says)


def _private(data_dir: Path) -> Iterator[Finding]:
    """Keys, prompts and answers are in there."""
    readable = [
        path.name
        for path in (data_dir, *sorted(data_dir.glob("*.sqlite*")))
        if path.exists() and path.stat().st_mode & _OTHERS_MAY_READ and not _is_behind(path)
    ]
    if readable:
        yield warning(
            "Permissions",
            f"other users can read {', '.join(readable)} of {data_dir}",
            f"chmod -R go= {data_dir}",
        )
    elif data_dir.exists():
        yield ok("Permissions", f"other users cannot read what is in {data_dir}")


def _is_behind(path: Path) -> bool:
    """Whether a folder above keeps others out."""
    return any(not parent.stat().st_mode & (stat.S_IXGRP | stat.S_IXOTH) for parent in path.parents)


def check_port(config: Config) -> Finding:
    """Whether the server could listen."""
    server = config.server
    if server.port == 0:
        return ok("Port", "a free one will be taken")
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((server.host, server.port))
        except PermissionError:
            return problem(
                "Port",
                f"this user may not listen on port {server.port}",
                "set server.port to 1024 or more, or put a proxy before it",
            )
        except OSError as error:
            return warning(
                "Port",
                f"{server.host}:{server.port} cannot be listened on: {error.strerror}",
                "fine if that is rigserve running; else end who has it, or set server.port",
            )
    return ok("Port", f"{server.host}:{server.port} is free")


def check_tls(config: Config) -> Iterator[Finding]:
    """Whether certificate and key can be read, and the key by this user only."""
    for name, text in (
        ("server.tls_certificate", config.server.tls_certificate),
        ("server.tls_key", config.server.tls_key),
    ):
        if text is None:
            continue
        path = Path(text)
        if not os.access(path, os.R_OK):
            yield problem(name, f"{path} is not there, or cannot be read", "see docs/security.md")
        elif name.endswith("key") and path.stat().st_mode & _OTHERS_MAY_READ:
            yield warning(name, f"other users can read {path}", f"chmod 600 {path}")
        else:
            yield ok(name, str(path))


def check_energy(config: Config) -> Finding:
    """Whether energy is measured."""
    meter = open_meter(config.cost.power)
    meter.close()
    if meter.source != ESTIMATED:
        return ok("Energy", f"measured by {meter.source}")
    return warning(
        "Energy",
        f"nothing here measures it: {config.cost.power.load_watts:.0f} W are assumed, and labelled so",
        "measure the rig at the wall and set cost.power; on Intel and AMD processors, let this user "
        "read /sys/class/powercap/intel-rapl:*/energy_uj",
    )


def check_models(config: Config) -> Iterator[Finding]:
    """Whether the models' files are there; that those named by a path are, the config's own check has seen."""
    for model in config.local_models:
        yield _model(model)
    for remote in config.remote_models:
        yield unchecked(
            f"Model {remote.name}", f"{remote.base_url} was not asked: calls there may cost money"
        )


def _model(model: ModelConfig) -> Finding:
    check = f"Model {model.name}"
    source = getattr(model, "source", None)
    if source is None:
        return unchecked(check, f"its engine {model.engine} was not asked")
    try:
        if not HubSource.is_one(source):
            return ok(check, str(local_path(source)))
        hub = HubSource.parse(source)
        cached = try_to_load_from_cache(hub.repo_id, hub.file or "", revision=hub.revision)
    except (ModelError, ValueError) as error:
        return problem(check, str(error), "correct its source in the config")
    if isinstance(cached, str):
        return ok(check, cached)
    return unchecked(
        check,
        f"{source} is not downloaded yet: it will be at the first start",
        f"rigserve models pull {source}",
    )
