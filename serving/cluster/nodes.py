"""What a Ray cluster has, and what replicas take of it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import ray

from serving.cluster.placing import Node, Share

NAMESPACE = "rigserve"
GPU_LABEL = "rigserve/gpu-mib"
"""The label of a node with the memory of the smallest of its cards, in MiB."""
_MIB = 2**20


def join(address: str) -> None:
    """Be part of the cluster; raises ``ConnectionError`` if there is none."""
    ray.init(
        address=address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def nodes() -> list[Node]:
    """Those that are alive."""
    return [_node(told) for told in ray.nodes() if told["Alive"]]


def addresses() -> dict[str, str]:
    """The addresses of those that are alive, by their ids."""
    return {told["NodeID"]: told["NodeManagerAddress"] for told in ray.nodes() if told["Alive"]}


def shares() -> list[Share]:
    """What the replicas that live, or are about to, take."""
    found = []
    for name in ray.util.list_named_actors():
        with contextlib.suppress(ValueError, TypeError):
            found.append(Share.from_name(name))
    return found


def _node(told: dict[str, Any]) -> Node:
    resources, labels = told["Resources"], told.get("Labels") or {}
    gpu_mib = labels.get(GPU_LABEL)
    return Node(
        id=told["NodeID"],
        cpus=resources.get("CPU", 0.0),
        memory_mib=int(resources.get("memory", 0.0) / _MIB),
        gpus=resources.get("GPU", 0.0),
        gpu_mib=int(gpu_mib) if gpu_mib else None,
    )
