"""`rigserve cluster`: serve with engines on several machines, and make a cluster of these."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from serving.cluster.environment import keep_token, ray_environment
from serving.config import load_config, located
from serving.hardware.memory import gpus
from serving.logs import set_up
from serving.serve import log_folder, serve

_PORT = 6379


class ClusterError(Exception):
    """The cluster cannot be used; the message is for the person who asked."""


def add_cluster_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], *, default_config: Path
) -> None:
    """Add `cluster` and its actions."""
    command = commands.add_parser("cluster", help="serve with engines on several machines (Ray)")
    actions = command.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("start", help="make this machine the head of a new cluster")
    action.add_argument(
        "--address", metavar="IP", help="its address for the others (default: found)"
    )
    action.add_argument("--port", type=int, default=_PORT, help=f"TCP port (default: {_PORT})")
    action.set_defaults(run=_start)

    action = actions.add_parser("join", help="make this machine a node of a cluster")
    action.add_argument(
        "head", metavar="HOST:PORT", help="the head's address, as `start` has told it"
    )
    action.add_argument(
        "--address", metavar="IP", help="its address for the others (default: found)"
    )
    action.set_defaults(run=_join)

    action = actions.add_parser("serve", help="as `rigserve serve`, with engines on the nodes")
    _add_config(action, default_config)
    action.add_argument("--verbose", action="store_true", help="log what the libraries say, too")
    action.set_defaults(run=_serve)

    action = actions.add_parser("status", help="show nodes, and the replicas on them")
    _add_config(action, default_config)
    action.set_defaults(run=_status)


def _add_config(action: argparse.ArgumentParser, default_config: Path) -> None:
    action.add_argument(
        "config",
        metavar="CONFIG",
        type=Path,
        nargs="?",
        default=default_config,
        help="YAML file (default: the embedded model's)",
    )


def _start(args: argparse.Namespace) -> int:
    _require_ray()
    made = _ray("get-auth-token", "--generate", quiet=True)
    keep_token()
    words = ["--head", f"--port={args.port}", "--include-dashboard=false"]
    status = _ray_start(args, words)
    if status == 0:
        print(
            "\nOther machines come in with the token that `ray get-auth-token` prints, in their ~/.ray/auth_token:\n"
            f"    rigserve cluster join {args.address or 'THIS_MACHINE'}:{args.port}"
        )
    return status or made


def _join(args: argparse.Namespace) -> int:
    _require_ray()
    return _ray_start(args, [f"--address={args.head}"])


def _ray_start(args: argparse.Namespace, words: list[str]) -> int:
    if args.address:
        words.append(f"--node-ip-address={args.address}")
    cards = gpus()
    words.append(f"--num-gpus={len(cards)}")
    if cards:
        from serving.cluster.nodes import GPU_LABEL

        words.append(f"--labels={GPU_LABEL}={min(card.total_mib for card in cards)}")
    return _ray("start", *words)


def _ray(*words: str, quiet: bool = False) -> int:
    """Run Ray's own command; ``quiet``: what it prints is for nobody."""
    environment = {**os.environ, **ray_environment(needs_token=True)}
    return subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *words],
        env=environment,
        stdout=subprocess.DEVNULL if quiet else None,
        check=False,
    ).returncode


def _serve(args: argparse.Namespace) -> int:
    _require_ray()
    from serving.cluster.site import RayCluster

    config = load_config(args.config)
    set_up(config.logging, log_folder(config), verbose=args.verbose)
    with located(args.config):
        serve(config, args.config, RayCluster())
    return 0


def _status(args: argparse.Namespace) -> int:
    _require_ray()
    os.environ.update(ray_environment())
    from serving.cluster import nodes

    address = load_config(args.config).cluster.address
    try:
        nodes.join(address)
    except ConnectionError as error:
        raise ClusterError(
            f"there is no cluster at {address}; start one with `rigserve cluster start`"
        ) from error
    table = Table("node", "address", "cores", "memory", "cards", "replicas")
    addresses, shares = nodes.addresses(), nodes.shares()
    for node in nodes.nodes():
        replicas = [
            f"{share.replica} ({f'{share.gpus:g} cards, ' if share.gpus else ''}{share.memory_mib:,} MiB)"
            for share in shares
            if share.node == node.id
        ]
        cards = f"{node.gpus:g} of {node.gpu_mib or '?'} MiB" if node.gpus else "-"
        table.add_row(
            *(node.id[:8], addresses.get(node.id, "?"), f"{node.cpus:g}"),
            *(f"{node.memory_mib:,} MiB", cards, "\n".join(replicas) or "-"),
        )
    Console().print(table)
    return 0


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise ClusterError("there is no Ray here; install it: pip install 'rigserve[cluster]'")
