"""LoRA adapters for vLLM: folders as PEFT saves them. It knows no scale: one that has another is written anew with it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from serving.config import AdapterConfig
from serving.models.sources import ModelError

_CONFIG = "adapter_config.json"
# Ranks that vLLM has room for.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def folder_of(adapter: AdapterConfig, cache_dir: Path) -> Path:
    """The folder that vLLM loads; made in ``cache_dir`` for a scale that is not 1. Raises :class:`ModelError`."""
    path = Path(adapter.path)
    config = _config(adapter)
    if adapter.scale == 1:
        return path
    identity = json.dumps([str(path.resolve()), adapter.scale, config])
    scaled = cache_dir / f"lora-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    scaled.mkdir(parents=True, exist_ok=True)
    alpha = adapter.scale * config.get("lora_alpha", 8)
    (scaled / _CONFIG).write_text(json.dumps(config | {"lora_alpha": alpha}), encoding="utf-8")
    for file in path.iterdir():
        link = scaled / file.name
        if file.name != _CONFIG and not link.exists():
            link.symlink_to(file.resolve())
    return scaled


def rank_of(adapters: tuple[AdapterConfig, ...], least: int) -> int:
    """Room for the ranks of all of them, and for ``least``. Raises :class:`ModelError`."""
    highest = max([least, *(_config(adapter).get("r", 8) for adapter in adapters)])
    fitting = [rank for rank in _RANKS if rank >= highest]
    if not fitting:
        raise ModelError(f"an adapter's rank is {highest}; vLLM takes {_RANKS[-1]} at most")
    return fitting[0]


def _config(adapter: AdapterConfig) -> dict[str, Any]:
    file = Path(adapter.path) / _CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the adapter '{adapter.name}' ({adapter.path}): vLLM takes folders as PEFT saves them, with an "
            f"{_CONFIG}; {file} cannot be read: {error}"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"the adapter '{adapter.name}': {file} is none of a LoRA adapter")
    return config
