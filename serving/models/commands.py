"""`rigserve models convert|checksum`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from serving.models.checksums import digest_of
from serving.models.peft import convert_adapter
from serving.models.sources import ModelError, resolve


def add_convert_action(actions: Any) -> None:
    """``convert``, among the ``actions`` of ``rigserve models``; what it runs raises ``ModelError``."""
    action = actions.add_parser(
        "convert", help="make a GGUF adapter of a LoRA fine-tune that PEFT has saved"
    )
    action.add_argument("folder", metavar="FOLDER", type=Path, help="with adapter_config.json")
    action.add_argument(
        "--base", metavar="SOURCE", required=True, help="its base model, as 'source' in a config"
    )
    action.add_argument("--out", metavar="FILE", type=Path, help="default: FOLDER.gguf")
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
            digest = digest_of(path if path.exists() else resolve(source))
        except OSError as error:
            raise ModelError(f"{source}: cannot read it: {error.strerror}") from error
        print(f"{digest}  {source}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    folder = args.folder.absolute()
    out = args.out or folder.with_name(f"{folder.name}.gguf")
    count = convert_adapter(folder, resolve(args.base), out)
    print(f"{out}: changes {count} matrices of the base model")
    return 0
