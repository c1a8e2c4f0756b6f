"""`rigserve models search`, `pull`, `list`, `remove` and `verify`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from huggingface_hub.utils.tqdm import disable_progress_bars
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from serving.config import load_config
from serving.models.catalog import CatalogModel, catalog_models, find_model
from serving.models.downloads import (
    CachedFile,
    cached_files,
    check_disk,
    chosen,
    fetch_files,
    is_intact,
    look_up,
    remove_files,
    search_hub,
)
from serving.models.hub import HubSource, ModelError

FitWarning = Callable[[str], str | None]
"""Why a source will not fit this machine, in a sentence; None if it will, or nobody can tell."""

_PAGE_WIDTH = 120
_INTERRUPTED = 130


def add_download_actions(actions: Any, *, default_config: Path, fit_warning: FitWarning) -> None:
    """Add them to the ``actions`` of ``rigserve models``. What they run raises ``ModelError``.

    ``fit_warning`` is asked before a download; what it says is printed, and who is at a terminal is asked.
    """
    action = actions.add_parser("search", help="find models: in the catalog, and on the Hub")
    action.add_argument("words", metavar="WORDS", help="part of a name, such as qwen3 or coder")
    action.add_argument("--all", action="store_true", help="not only repositories with GGUF files")
    action.add_argument("--limit", type=int, default=20, help="of the Hub's (default: 20)")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(run=_search)

    action = actions.add_parser("pull", help="download a model; takes up one that broke off")
    action.add_argument(
        "source",
        metavar="SOURCE",
        help="hf://ORG/REPO/FILE.gguf, hf://ORG/REPO (safetensors), or a name of the catalog",
    )
    action.add_argument(
        "--include", metavar="PATTERN", nargs="+", default=[], help="files of a repository, as *Q4*"
    )
    action.add_argument("-y", "--yes", action="store_true", help="do not ask")
    action.set_defaults(run=_pull, fit_warning=fit_warning)

    action = actions.add_parser("list", help="what is on this machine, and how big it is")
    action.add_argument("--config", type=Path, default=default_config, help="whose cache_dir")
    action.add_argument("--json", action="store_true", help="print JSON")
    action.set_defaults(run=_list)

    action = actions.add_parser("remove", help="delete a download")
    action.add_argument("source", metavar="SOURCE", help="hf://ORG/REPO, or a file of it")
    action.add_argument("-y", "--yes", action="store_true", help="do not ask")
    action.set_defaults(run=_remove)

    action = actions.add_parser("verify", help="compare downloads with their checksums, offline")
    action.add_argument("source", metavar="SOURCE", nargs="?", help="default: all")
    action.set_defaults(run=_verify)


def _search(args: argparse.Namespace) -> int:
    words = args.words.casefold()
    known = [model for model in catalog_models() if words in model.repo.casefold()]
    if args.json:
        found = search_hub(args.words, gguf_only=not args.all, limit=args.limit)
        told = {
            "catalog": [_catalog_entry(model) for model in known],
            "hub": [asdict(each) for each in found],
        }
        print(json.dumps(told, indent=2))
        return 0
    console = _console()
    if known:  # the catalog is here, also where the Hub is out of reach
        console.print(_catalog_table(known))
    found = search_hub(args.words, gguf_only=not args.all, limit=args.limit)
    if found:
        table = Table("on the Hub", "downloads", "likes", "", box=None)
        for each in found:
            gated = "gated" if each.is_gated else ""
            table.add_row(f"hf://{each.repo_id}", f"{each.downloads:,}", str(each.likes), gated)
        console.print(table)
    if not known and not found:
        print(f"nothing is called {args.words!r}")
        return 1
    return 0


def _catalog_entry(model: CatalogModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "repo": model.repo,
        "parameters": model.architecture.parameters,
        "active_parameters": model.architecture.active_parameters,
        "context_length": model.architecture.context_length,
        "license": model.license,
        "good_for": model.good_for,
        "released": model.released,
    }


def _catalog_table(models: list[CatalogModel]) -> Table:
    table = Table("in the catalog", "parameters", "context", "good for", "license", box=None)
    for model in models:
        architecture = model.architecture
        size = f"{architecture.parameters / 1e9:.3g}B"
        if architecture.active_parameters < architecture.parameters:
            size += f", {architecture.active_parameters / 1e9:.2g}B active"
        table.add_row(
            model.name,
            size,
            f"{architecture.context_length:,}",
            " ".join(model.good_for),
            model.license,
        )
    return table


def _pull(args: argparse.Namespace) -> int:
    known = find_model(args.source)
    source = args.source if known is None else f"hf://{known.repo}"
    if not HubSource.is_one(source):
        raise ModelError(
            f"{args.source!r} is neither hf://ORG/REPO/FILE.gguf nor in the catalog; "
            f"look for it: rigserve models search {args.source}"
        )
    disable_progress_bars()  # the library's; there is one of ours
    fetch = look_up(source, args.include)
    if not fetch.missing_bytes:
        print(f"{source}: all {len(fetch.files)} files are here already", file=sys.stderr)
    else:
        check_disk(fetch)
        warning = args.fit_warning(source)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
        missing = [file for file in fetch.files if not file.is_here]
        print(
            f"{source}: {len(missing)} of {len(fetch.files)} files, "
            f"{fetch.missing_bytes / 1e9:.2f} GB of {fetch.total_bytes / 1e9:.2f} GB",
            file=sys.stderr,
        )
        is_asked = warning is not None and not args.yes and sys.stdin.isatty()
        if is_asked and not _is_agreed("Download it all the same?"):
            return 1
    try:
        with _Shown(fetch.missing_bytes) as shown:
            files = fetch_files(fetch, shown.here)
    except KeyboardInterrupt:
        print("interrupted; what has come is kept, and taken up by the next pull", file=sys.stderr)
        return _INTERRUPTED
    for file in files:
        if file.name.endswith((".gguf", ".safetensors")):
            print(file.path)
    return 0


class _Shown:
    """Progress of a download: a bar on a terminal, elsewhere a line for each tenth."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes, self._tenths = total_bytes, 0
        console = Console(stderr=True)
        self._is_terminal = console.is_terminal
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal or not total_bytes,
        )
        self._task = self._bar.add_task("", total=total_bytes or None)

    def __enter__(self) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def here(self, size_bytes: int) -> None:
        """So much has come."""
        self._bar.update(self._task, completed=size_bytes)
        tenths = 10 * size_bytes // self._total_bytes if self._total_bytes else 0
        if tenths > self._tenths and not self._is_terminal:
            self._tenths = tenths
            print(f"{10 * tenths} %", file=sys.stderr, flush=True)


def _list(args: argparse.Namespace) -> int:
    files = cached_files()
    cache_dir = Path(load_config(args.config).storage.cache_dir)
    prepared = sorted(cache_dir.glob("*.gguf"))
    if args.json:
        told = {
            "downloaded": [
                {
                    "source": file.source,
                    "path": str(file.path),
                    "size_bytes": file.size_bytes,
                    "fetched_at_unix": file.fetched_at_unix,
                }
                for file in files
            ],
            "prepared": [
                {"path": str(path), "size_bytes": path.stat().st_size} for path in prepared
            ],
        }
        print(json.dumps(told, indent=2))
        return 0
    table = Table("", "GB", "since", box=None, show_header=bool(files or prepared))
    for file in files:
        when = datetime.fromtimestamp(file.fetched_at_unix).astimezone()
        table.add_row(file.source, f"{file.size_bytes / 1e9:.2f}", when.strftime("%Y-%m-%d"))
    for path in prepared:
        status = path.stat()
        when = datetime.fromtimestamp(status.st_mtime).astimezone()
        table.add_row(f"prepared: {path}", f"{status.st_size / 1e9:.2f}", when.strftime("%Y-%m-%d"))
    _console().print(table)
    total_bytes = sum(file.size_bytes for file in files)
    total_bytes += sum(path.stat().st_size for path in prepared)
    print(f"{total_bytes / 1e9:.2f} GB in {len(files) + len(prepared)} files")
    return 0


def _remove(args: argparse.Namespace) -> int:
    files = chosen(cached_files(), args.source)
    size_bytes = sum(file.size_bytes for file in files)
    for file in files:
        print(file.source, file=sys.stderr)
    question = f"Delete these {len(files)} files, {size_bytes / 1e9:.2f} GB?"
    if not args.yes and not _is_agreed(question):
        print("nothing is deleted; --yes deletes without asking", file=sys.stderr)
        return 1
    print(f"{remove_files(files) / 1e9:.2f} GB are free again")
    return 0


def _verify(args: argparse.Namespace) -> int:
    files = cached_files()
    if args.source is not None:
        files = chosen(files, args.source)
    damaged = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=sum(file.size_bytes for file in files))
        for file in files:
            bar.update(task, description=file.name)
            damaged += _tell(file, is_intact(file, lambda size: bar.advance(task, size)))
    print(f"{len(files)} files, {damaged} damaged")
    return 1 if damaged else 0


def _tell(file: CachedFile, intact: bool | None) -> bool:
    """Print how a file is; returns whether it is damaged."""
    if intact is None:
        print(f"not checked  {file.source}: its checksum is not known here")
    elif intact:
        print(f"ok           {file.source}")
    else:
        print(
            f"DAMAGED      {file.source}: rigserve models remove {file.source}, then pull it again"
        )
    return intact is False


def _is_agreed(question: str) -> bool:
    """Whether somebody says so; nobody does where there is no terminal."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().casefold() in ("y", "yes")


def _console() -> Console:
    console = Console()
    # What is read by a program must not be folded to 80 columns.
    console.width = console.width if console.is_terminal else max(console.width, _PAGE_WIDTH)
    return console
