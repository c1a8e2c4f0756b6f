"""On which node of a cluster a replica goes, and what of it it takes. Pure: it decides, others act. Memory is in MiB (2**20 bytes)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

# Ray counts parts of a card in these.
_STEPS_OF_A_GPU = 10_000


@dataclass(frozen=True, slots=True)
class Node:
    """What a node has for engines; ``gpu_mib`` is the memory of the smallest of its cards, None if it is not known."""

    id: str
    cpus: float
    memory_mib: int
    gpus: float = 0.0
    gpu_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Want:
    """What a replica of ``model`` takes: on cards ``gpu_mib`` of their memory and ``host_mib`` of the main memory, else ``cpu_mib``.

    ``cards``: so many whole ones. ``cpus``: so many cores where it has no card; None is all that a node has.
    """

    model: str
    cpu_mib: int
    host_mib: int = 0
    gpu_mib: int = 0
    cards: int | None = None
    cpus: int | None = None
    may_use_gpus: bool = True


@dataclass(frozen=True, slots=True)
class Share:
    """What a replica of ``model`` takes of a node. ``replica`` tells it from the others."""

    model: str
    replica: str
    node: str
    cpus: float
    memory_mib: int
    gpus: float
    on_gpus: bool

    def to_name(self) -> str:
        """A name for its actor, by which those who come after see what is taken."""
        return json.dumps(asdict(self))

    @classmethod
    def from_name(cls, name: str) -> Share:
        """What the name of an actor says; raises ``ValueError`` or ``TypeError`` if that is none of ours."""
        return cls(**json.loads(name))


def place(want: Want, replica: str, nodes: Sequence[Node], taken: Iterable[Share]) -> Share | None:
    """Where a replica goes; None while no node has the room.

    On cards where the cluster has any, where the fewest replicas of its model are, and most is free.
    """
    taken = tuple(taken)
    on_gpus = _is_for_cards(want, nodes)
    found: list[tuple[tuple[int, float], Share]] = []
    for node in nodes:
        here = [share for share in taken if share.node == node.id]
        share = _on_gpus(want, replica, node) if on_gpus else _on_cpus(want, replica, node)
        if share is None:
            continue
        left = (
            node.cpus - sum(each.cpus for each in here) - share.cpus,
            node.memory_mib - sum(each.memory_mib for each in here) - share.memory_mib,
            # Sums of parts are not exact.
            round(node.gpus - sum(each.gpus for each in here) - share.gpus, 4),
        )
        if min(left) < 0 or not _cards_can_be_given(node, [each.gpus for each in (*here, share)]):
            continue
        free = left[2] / node.gpus if on_gpus else left[1] / node.memory_mib
        found.append(((sum(each.model == want.model for each in here), -free), share))
    return min(found, key=lambda each: each[0], default=(None, None))[1]


def needed(want: Want, nodes: Sequence[Node]) -> str:
    """What :func:`place` looks for on one of these nodes, in words."""
    if not _is_for_cards(want, nodes):
        cpus = "all its cores" if want.cpus is None else f"{want.cpus} cores"
        return f"{want.cpu_mib} MiB of main memory and {cpus} free"
    if want.cards is None:
        cards = f"{want.gpu_mib} MiB of cards' memory"
    else:
        cards = f"{want.cards} cards" if want.cards else "cards"
    return f"{cards} and {want.host_mib} MiB of main memory free (devices: [cpu] has a model do without cards)"


def _is_for_cards(want: Want, nodes: Sequence[Node]) -> bool:
    return want.may_use_gpus and any(node.gpus for node in nodes)


def _on_gpus(want: Want, replica: str, node: Node) -> Share | None:
    if not node.gpus:
        return None
    if want.cards is not None:
        gpus = float(want.cards)
    elif not node.gpu_mib:
        return None
    else:
        part = want.gpu_mib / node.gpu_mib
        # Ray gives parts of one card, or several whole ones.
        gpus = math.ceil(part * _STEPS_OF_A_GPU) / _STEPS_OF_A_GPU if part <= 1 else math.ceil(part)
    return Share(want.model, replica, node.id, 0.0, want.host_mib, gpus, on_gpus=True)


def _cards_can_be_given(node: Node, shares: Iterable[float]) -> bool:
    """Whether these fit on a node's cards: what is left of two cards is no third one."""
    left = [_STEPS_OF_A_GPU] * int(node.gpus)
    for share in sorted((round(each * _STEPS_OF_A_GPU) for each in shares if each), reverse=True):
        # As Ray does: whole ones that nobody has, parts where the least is left over.
        parts = [_STEPS_OF_A_GPU] * (share // _STEPS_OF_A_GPU) or [share]
        for part in parts:
            card = min((each for each in left if each >= part), default=None)
            if card is None:
                return False
            left[left.index(card)] -= part
    return True


def _on_cpus(want: Want, replica: str, node: Node) -> Share | None:
    cpus = node.cpus if want.cpus is None else float(want.cpus)
    return Share(want.model, replica, node.id, cpus, want.cpu_mib, 0.0, on_gpus=False)
