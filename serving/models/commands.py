"""`rigserve models convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from serving.models.peft import convert_adapter
from serving.models.sources import resolve


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


def _convert(args: argparse.Namespace) -> int:
    folder = args.folder.absolute()
    out = args.out or folder.with_name(f"{folder.name}.gguf")
    count = convert_adapter(folder, resolve(args.base), out)
    print(f"{out}: changes {count} matrices of the base model")
    return 0
