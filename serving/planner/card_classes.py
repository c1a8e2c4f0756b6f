"""The configs in ``configs/`` for classes of cards: ``python -m serving.planner.card_classes`` writes them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from serving.config import CostConfig, MemoryConfig
from serving.models.catalog import find_model
from serving.planner.config_file import config_text
from serving.planner.options import Plan, Wishes, plan
from serving.planner.rig import assumed_rig
from serving.planner.subject import of_catalog


@dataclass(frozen=True, slots=True)
class CardClass:
    """A class of rigs: the slowest common card with that memory stands for it, and a model that suits it."""

    file: str
    title: str
    cards: tuple[str, ...]
    model: str
    users: int
    context_tokens: int
    memory_gib: int = 32


CLASSES = (
    CardClass(
        "gpu-8gb.yaml", "A card with 8 GB, such as an RTX 4060.", ("rtx 4060 8gb",), "qwen3-8b", 2, 4096
    ),
    CardClass(
        "gpu-12gb.yaml", "A card with 12 GB, such as an RTX 3060.", ("rtx 3060 12gb",), "qwen3-14b", 2, 4096
    ),
    CardClass(
        "gpu-16gb.yaml", "A card with 16 GB, such as an RTX 4060 Ti.", ("rtx 4060 ti 16gb",), "gpt-oss-20b", 4, 16384
    ),
    CardClass(
        "gpu-24gb.yaml", "A card with 24 GB, such as an RTX 3090.", ("rtx 3090",), "qwen3-30b-a3b", 4, 8192
    ),
    CardClass(
        "gpu-32gb.yaml", "A card with 32 GB, such as an RTX 5090.", ("rtx 5090",), "qwen3-32b", 4, 8192
    ),
    CardClass(
        "gpu-2x24gb.yaml", "Two cards with 24 GB, such as two RTX 3090.", ("rtx 3090", "rtx 3090"),
        "llama-3.3-70b-instruct", 2, 8192,
    ),
    CardClass("cpu.yaml", "No card, 16 GB of memory.", (), "qwen3-4b", 2, 8192, 16),
    CardClass(
        "unified-64gb.yaml", "One memory of 64 GB, as of a Ryzen AI Max+ 395.", ("ryzen ai max+ 395 64gb",),
        "qwen3-30b-a3b", 4, 32768,
    ),
)  # fmt: skip


def plan_of(card_class: CardClass) -> Plan:
    """The plan that a class's config is written from."""
    model = find_model(card_class.model)
    assert model is not None, card_class.model
    memory = MemoryConfig()
    rig = assumed_rig(
        card_class.cards,
        1024 * card_class.memory_gib,
        reserve_mib=memory.reserve_mib,
        gpu_reserve_mib=memory.gpu_reserve_mib,
    )
    wishes = Wishes(card_class.context_tokens, card_class.users)
    return plan(of_catalog(model), rig, wishes, CostConfig())


def text_of(card_class: CardClass) -> str:
    """The config's text; the plan must have an option that fits."""
    found = plan_of(card_class)
    return config_text(found, found.options[0], title=card_class.title)


def main(folder: str = "configs") -> None:
    """Write all of them."""
    for card_class in CLASSES:
        (Path(folder) / card_class.file).write_text(text_of(card_class), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
