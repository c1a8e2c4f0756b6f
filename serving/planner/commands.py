"""`rigserve plan`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.config import CostConfig, load_config
from serving.hardware.catalog import UnknownCard, find_card
from serving.hardware.memory import gpus, host_total_mib
from serving.models.catalog import catalog_models, find_model
from serving.models.sources import ModelError
from serving.planner.options import Wishes, plan
from serving.planner.render import render, to_json
from serving.planner.rig import MIB, Device, Rig, device_of
from serving.planner.subject import Subject, of_catalog

# Of what is read by a program, not folded to 80 columns.
_PAGE_WIDTH = 140
_GPU_RESERVE_MIB, _HOST_RESERVE_MIB = 512, 2048
# Main memory of a rig that is only thought of: two channels of DDR5, and what reads of it reach.
_ASSUMED_MEMORY_GIB, _ASSUMED_BANDWIDTH_BYTES = 32, 60e9
# A desktop's eight cores with AVX2, at what they do of INT8 and FP32.
_ASSUMED_INT8, _ASSUMED_FP16 = 4e12, 1e12


class PlanError(Exception):
    """A plan cannot be made of what was asked; the message names the argument and the mend."""


def add_plan_command(commands: Any, *, default_config: Path) -> None:
    """``plan``, among the program's ``commands``. What it runs raises :class:`PlanError`, ``ConfigError``, ``ModelError``."""
    command = commands.add_parser(
        "plan", help="will a model fit, how fast, at what price; or which to take"
    )
    command.add_argument(
        "model", metavar="MODEL", nargs="?", help="a name of the catalog, or a model's 'source'"
    )
    command.add_argument(
        "--gpu",
        metavar="NAME",
        action="append",
        default=[],
        help="plan for this card, such as 'rtx 3090'; twice for two (default: this machine's)",
    )
    command.add_argument(
        "--ram", metavar="GIB", type=float, help="main memory beside --gpu (default: 32)"
    )
    command.add_argument("--context", metavar="N", type=int, help="tokens of one request")
    command.add_argument("--users", metavar="N", type=int, help="requests at a time")
    command.add_argument(
        "--slo", metavar="ttft=1s,tpot=50ms", type=_slo, default={}, help="latencies to keep"
    )
    command.add_argument("--all", action="store_true", help="show all options that fit")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--config", type=Path, default=default_config, help="its cost section")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    cost = load_config(args.config).cost
    wishes = Wishes(
        context_tokens=_positive("--context", args.context),
        users=_positive("--users", args.users),
        first_token_seconds=args.slo.get("ttft"),
        token_seconds=args.slo.get("tpot"),
    )
    rig = _rig(args.gpu, args.ram, cost)
    found = plan(_subject(args.model), rig, wishes, cost)
    if args.json:
        print(json.dumps(to_json(found), indent=2))
    else:
        console = Console()
        console.width = console.width if console.is_terminal else max(console.width, _PAGE_WIDTH)
        console.print(render(found, show_all=args.all))
    return 0 if found.options else 1


def _subject(name: str) -> Subject:
    model = find_model(name)
    if model is None:
        raise PlanError(f"{name}: not in the catalog")
    return of_catalog(model)


def _rig(names: Sequence[str], ram_gib: float | None, cost: CostConfig) -> Rig:
    if names:
        try:
            cards = tuple(device_of(find_card(name), reserve_mib=_GPU_RESERVE_MIB) for name in names)
        except UnknownCard as error:
            raise PlanError(f"--gpu: {error}") from error
        return Rig(_assumed_host(ram_gib, cards), cards, is_assumed=True)
    memory_bytes = (host_total_mib() - _HOST_RESERVE_MIB) * MIB
    host = Device(
        "this machine's processor",
        "cpu",
        memory_bytes,
        _ASSUMED_BANDWIDTH_BYTES,
        _ASSUMED_INT8,
        _ASSUMED_FP16,
    )
    there = []
    for gpu in gpus():
        card = find_card(gpu.name, gpu.total_mib)
        there.append(device_of(card, reserve_mib=_GPU_RESERVE_MIB, free_mib=gpu.free_mib))
    return Rig(host, tuple(there))


def _assumed_host(ram_gib: float | None, cards: Sequence[Device]) -> Device:
    if any(card.card and card.card.has_unified_memory for card in cards):
        card = cards[0].card
        assert card is not None
        memory_mib = card.memory_mib
    else:
        memory_mib = int((ram_gib or _ASSUMED_MEMORY_GIB) * 1024)
    return Device(
        "a desktop processor",
        "cpu",
        (memory_mib - _HOST_RESERVE_MIB) * MIB,
        _ASSUMED_BANDWIDTH_BYTES,
        _ASSUMED_INT8,
        _ASSUMED_FP16,
    )


def _positive(name: str, number: int | None) -> int | None:
    if number is not None and number < 1:
        raise PlanError(f"{name} is {number}; give a number above 0")
    return number


def _slo(text: str) -> dict[str, float]:
    """``ttft=1s,tpot=50ms`` as seconds by name."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        seconds = _seconds(value)
        if name not in ("ttft", "tpot") or seconds is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form ttft=1s or tpot=50ms")
        found[name] = seconds
    return found


def _seconds(text: str) -> float | None:
    scale, number = (1e-3, text[:-2]) if text.endswith("ms") else (1.0, text.removesuffix("s"))
    try:
        seconds = scale * float(number)
    except ValueError:
        return None
    return seconds if seconds > 0 else None
