"""`rigserve engines`: which engines there are, and installing and removing vLLM."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from serving.config import load_config
from serving.config.load import LLAMA_SERVER
from serving.engines.vllm.environment import Environment, Environments
from serving.engines.vllm.install import (
    InstallError,
    Plan,
    Tell,
    build_for_here,
    check,
    install,
    remove,
    users_of,
)

_VLLM = "vllm"
_LIBRARY = "llama_cpp"
# Drivers of cards take their time to answer first.
_ASK_SECONDS = 60.0


def add_engines_command(commands: Any, *, default_config: Path) -> None:
    """``rigserve engines``, among the parser's ``commands``."""
    command = commands.add_parser("engines", help="list engines; install or remove vLLM")
    actions = command.add_subparsers(metavar="ACTION", required=True)

    action = actions.add_parser("list", help="which engines are here, and whether they work")
    action.add_argument("--check", action="store_true", help="have each vLLM serve a tiny model")
    _add_config(action, default_config)
    action.set_defaults(run=_list)

    action = actions.add_parser(
        "install", help="make an environment with an engine, or use another version"
    )
    action.add_argument("engine", metavar="ENGINE", choices=[_VLLM], help=_VLLM)
    action.add_argument("--version", dest="wanted", metavar="VERSION", help="default: the newest")
    action.add_argument(
        "--build",
        choices=["cuda", "cpu"],
        help="default: cuda where there is an NVIDIA card, or else cpu",
    )
    _add_config(action, default_config)
    action.set_defaults(run=_install)

    action = actions.add_parser("remove", help="remove what install has made")
    action.add_argument("engine", metavar="ENGINE", choices=[_VLLM], help=_VLLM)
    action.add_argument("--version", dest="wanted", metavar="VERSION", help="default: all versions")
    _add_config(action, default_config)
    action.set_defaults(run=_remove)


def _add_config(action: argparse.ArgumentParser, default_config: Path) -> None:
    action.add_argument(
        "--config",
        metavar="CONFIG",
        type=Path,
        default=default_config,
        help="its storage.data_dir is where they are",
    )


def _environments(args: argparse.Namespace) -> Environments:
    return Environments(Path(load_config(args.config).storage.data_dir))


def _install(args: argparse.Namespace) -> int:
    environments = _environments(args)
    began = time.monotonic()
    with _progress() as tell:
        made = install(environments, Plan(args.build or build_for_here(), args.wanted), tell)
    print(f"vLLM {made.version} ({made.build}) is installed and serves: {made.folder}")
    print(f"It took {time.monotonic() - began:.0f} s. New engines use it (engine: vllm).")
    others = [each.version for each in environments.all() if each != made]
    if others:
        print(
            f"Still there: {', '.join(others)}. Go back with --version; remove one with: "
            "rigserve engines remove vllm --version VERSION"
        )
    return 0


def _remove(args: argparse.Namespace) -> int:
    for each in remove(_environments(args), args.wanted):
        print(f"vLLM {each.version} ({each.build}) is removed")
    return 0


def _list(args: argparse.Namespace) -> int:
    environments = _environments(args)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("ENGINE", "VERSION", "STATE", "WHERE"):
        table.add_column(title, overflow="fold")
    # Within this process a damaged library could end it.
    loads = _printed([sys.executable, "-c", f"import {_LIBRARY}; print('loads')"])
    package, is_well = f"llama-cpp-python {version('llama-cpp-python')}", loads == "loads"
    state = loads if is_well else f"broken: {loads}; set up rigserve again (make setup)"
    table.add_row("llama_cpp", package, state, "with rigserve")
    program = shutil.which(LLAMA_SERVER)
    if program is None:
        table.add_row("llama_server", "-", "not found", "nowhere on PATH; docs/engines.md")
    else:
        printed = _printed([program, "--version"])
        found = re.search(r"version: (.+?)(?:;|$)", printed)
        is_well &= found is not None
        state = "runs" if found else f"broken: {printed}; install it again"
        table.add_row("llama_server", found[1] if found else "-", state, program)
    there = list(environments.all())
    for each in there:
        state, works = _state(each, environments.current, checking=args.check)
        is_well &= works
        table.add_row("vllm", f"{each.version} ({each.build})", state, str(each.folder))
    if not there:
        table.add_row("vllm", "-", "not installed", "rigserve engines install vllm")
    for folder in environments.unfinished():
        table.add_row("vllm", "-", "not finished; the next install removes it", str(folder))
    Console().print(table)
    return 0 if is_well else 1


def _printed(command: Sequence[str]) -> str:
    """The last lines that a program prints, in one; or why it prints nothing."""
    try:
        asked = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_ASK_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = asked.stdout.strip().splitlines()[-2:]
    return "; ".join(lines) or f"it says nothing, and exits with code {asked.returncode}"


def _state(each: Environment, current: Environment | None, *, checking: bool) -> tuple[str, bool]:
    """What is told of an environment, and whether it is well."""
    words = ["in use by new engines"] if each == current else ["kept"]
    if not each.python.exists():
        return "broken: its Python is gone; install it again", False
    if checking:
        try:
            check(each.python, each.build, lambda _: None)
        except InstallError as error:
            return f"broken: {str(error).splitlines()[0]}; install it again", False
        words.append("serves")
    if pids := users_of(each.folder):
        words.append(f"running as {', '.join(map(str, pids[:3]))}")
    when = datetime.fromtimestamp(each.installed_unix).astimezone().date().isoformat()
    return ", ".join([*words, f"installed {when}"]), True


@contextmanager
def _progress() -> Iterator[Tell]:
    """Tells what is being done: on a terminal in one line that moves, elsewhere a line for each step."""
    console = Console()
    if not console.is_terminal:
        began = time.monotonic()
        yield lambda step: print(f"[{time.monotonic() - began:5.0f} s] {step}", flush=True)
        return
    with console.status("beginning") as status:

        def tell(step: str) -> None:
            status.update(step)
            if not step.startswith(("choosing", "fetching")):
                console.print(f"  {step}", highlight=False)

        yield tell
