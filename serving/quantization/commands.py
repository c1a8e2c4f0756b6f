"""`rigserve models quantize`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from serving.config import load_config
from serving.config.schema import Quantization
from serving.quantization.render import render, to_json
from serving.quantization.variants import Progress, compare

_DEFAULT_TYPES = ["Q8_0", "Q5_K_M", "Q4_K_M"]
# Of what is read by a program, not folded to 80 columns.
_PAGE_WIDTH = 100
_INTERRUPTED = 130


def add_quantize_action(actions: Any, *, default_config: Path, text_path: Path) -> None:
    """``quantize``, among the ``actions`` of ``rigserve models``; ``text_path`` is what quality is measured on.

    What it runs raises ``ModelError`` and ``ConfigError``.
    """
    action = actions.add_parser(
        "quantize", help="make smaller variants of a model, and measure what they save and lose"
    )
    action.add_argument(
        "source", metavar="SOURCE", help="as 'source' in a config: a path, hf://, …"
    )
    action.add_argument(
        "--types",
        metavar="TYPE",
        nargs="+",
        choices=get_args(Quantization),
        default=_DEFAULT_TYPES,
        help=f"such as Q8_0 Q5_K_M Q4_K_M IQ4_XS (default: {' '.join(_DEFAULT_TYPES)})",
    )
    action.add_argument("--config", type=Path, default=default_config, help="whose cache_dir")
    action.add_argument("--json", action="store_true", help="print JSON, which has more of each")
    action.set_defaults(run=_quantize, text_path=text_path)


def _quantize(args: argparse.Namespace) -> int:
    cache_dir = Path(load_config(args.config).storage.cache_dir)
    try:
        with _Shown() as progress:
            comparison = compare(args.source, args.types, cache_dir, args.text_path, progress)
    except KeyboardInterrupt:
        print("interrupted; variants that were finished are kept, nothing else", file=sys.stderr)
        return _INTERRUPTED
    if args.json:
        print(json.dumps(to_json(comparison), indent=2))
        return 0
    console = Console()
    console.width = console.width if console.is_terminal else max(console.width, _PAGE_WIDTH)
    console.print(render(comparison))
    for variant in comparison.variants:
        if variant.path is not None:
            # Not through the console, which would break the line where the terminal ends.
            print(f"{variant.type}: {variant.path}")
    return 0


class _Shown(Progress):
    """Progress as a line on a terminal, with a bar; elsewhere a line for each step."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, transient=True, disable=not self._is_terminal)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, type_name: str, what: str) -> None:
        text = f"{type_name}: {what}"
        self._bar.reset(self._task, description=text)
        if not self._is_terminal:
            print(text, file=sys.stderr, flush=True)

    def chunk(self, done: int, of: int) -> None:
        self._bar.update(self._task, completed=done, total=of)
