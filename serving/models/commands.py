"""`rigserve models convert|checksum`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from serving.models.checksums import digest_of
from serving.models.huggingface import HUB, is_gguf, resolve_folder
from serving.models.peft import convert_adapter
from serving.models.requantize import TYPES
from serving.models.sources import ModelError, resolve


def add_convert_action(actions: Any) -> None:
    """``convert``, among the ``actions`` of ``rigserve models``; what it runs raises ``ModelError``."""
    action = actions.add_parser(
        "convert", help="make a GGUF file of a Hugging Face model, or of a LoRA that PEFT has saved"
    )
    action.add_argument(
        "folder",
        metavar="FOLDER",
        help="with config.json, or adapter_config.json; or a model on the Hub, hf://ORG/REPO",
    )
    action.add_argument(
        "--base", metavar="SOURCE", help="of a LoRA: its base model, as 'source' in a config"
    )
    action.add_argument(
        "--type",
        choices=TYPES,
        metavar="TYPE",
        help="of a model: its quantization, as Q4_K_M (default: as the weights are)",
    )
    action.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="default: FOLDER.gguf; of hf://ORG/REPO: REPO.gguf here",
    )
    action.set_defaults(run=_convert)


def add_checksum_action(actions: Any) -> None:
    """``checksum``, among the ``actions`` of ``rigserve models``; what it runs raises ``ModelError``."""
    action = actions.add_parser("checksum", help="print what 'sha256' in a config is to be")
    action.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="as in a config, or an adapter's file or folder",
    )
    action.set_defaults(run=_checksum)


def _checksum(args: argparse.Namespace) -> int:
    for source in args.sources:
        path = Path(source).expanduser()
        try:
            digest = digest_of(path if path.exists() else _resolved(source))
        except OSError as error:
            raise ModelError(f"{source}: cannot read it: {error.strerror}") from error
        print(f"{digest}  {source}")
    return 0


def _resolved(source: str) -> Path:
    is_repository = source.startswith(HUB) and not is_gguf(source)
    return resolve_folder(source) if is_repository else resolve(source)


def _convert(args: argparse.Namespace) -> int:
    if args.folder.startswith("hf://"):
        folder = resolve_folder(args.folder)
        beside = Path(args.folder.rpartition("/")[2].partition("@")[0]).absolute()
    else:
        beside = folder = Path(args.folder).expanduser().absolute()
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}")
    if (folder / "adapter_config.json").exists():
        return _convert_adapter(args, folder)
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has neither a config.json nor an adapter_config.json")
    if args.base:
        raise ModelError(f"--base: {folder} has no adapter_config.json; a whole model has no base")
    # Takes a fifth of a second, which other commands need not wait for.
    from serving.models.checkpoint import convert_checkpoint

    type_suffix = f"-{args.type}" if args.type else ""
    out = args.out or beside.with_name(f"{beside.name}{type_suffix}.gguf")
    made = convert_checkpoint(folder, out, args.type)
    print(f"{out}: {made.tensors} tensors, {made.quantization}, {out.stat().st_size / 1e6:.0f} MB")
    if made.left_out:
        some = ", ".join(repr(token) for token in made.left_out[:5])
        print(f"left out: {len(made.left_out)} tokens that the model has no embedding for ({some})")
    return 0


def _convert_adapter(args: argparse.Namespace, folder: Path) -> int:
    if args.base is None:
        raise ModelError(f"{folder} holds a LoRA; --base must name the model that it changes")
    if args.type:
        raise ModelError("--type: adapters are kept as they are")
    out = args.out or folder.with_name(f"{folder.name}.gguf")
    count = convert_adapter(folder, resolve(args.base), out)
    print(f"{out}: changes {count} matrices of the base model")
    return 0
