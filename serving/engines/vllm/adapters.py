"""LoRA adapters for vLLM: folders as PEFT saves them. It knows no scale: one that has another is written anew with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from serving.config import AdapterConfig, VllmModel
from serving.engines.launch import AdapterFile, AdapterRoom
from serving.folders import make_private
from serving.models.safetensors_header import SafetensorsError, read_safetensors
from serving.models.sources import ModelError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_UNPACKED = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Names of models have no such sign.
_VERSION_DIGITS = 12
_VERSION = re.compile(rf"#[0-9a-f]{{{_VERSION_DIGITS}}}")
# Adapters that one batch may mix, where the config does not say.
_SLOTS = 8
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
    make_private(scaled)
    # Modules that have an alpha of their own do not follow the one of all.
    alphas = {
        "lora_alpha": adapter.scale * config.get("lora_alpha", 8),
        "alpha_pattern": {
            module: adapter.scale * alpha
            for module, alpha in (config.get("alpha_pattern") or {}).items()
        },
    }
    # A vLLM that runs may read it at any time.
    partial = scaled / f"{_CONFIG}.{os.getpid()}.partial"
    partial.write_text(json.dumps(config | alphas), encoding="utf-8")
    partial.replace(scaled / _CONFIG)
    for file in path.iterdir():
        link = scaled / file.name
        if file.name != _CONFIG and not link.exists():
            link.symlink_to(file.resolve())
    return scaled


def check_fit(adapter: AdapterConfig, base: Path) -> None:
    """Raise :class:`ModelError` if an adapter's matrices have other sizes than those of the model in ``base``.

    vLLM would find that out with the adapter half in its place. What cannot be compared (names that the model does not have,
    weights that are packed) is for vLLM to judge.
    """
    file = Path(adapter.path) / _WEIGHTS
    if not file.exists():
        return
    try:
        matrices = read_safetensors(file)
        weights = {
            name: tensor
            for each in base.glob("*.safetensors")
            for name, tensor in read_safetensors(each).items()
        }
    except (SafetensorsError, OSError) as error:
        raise ModelError(f"the adapter '{adapter.name}': {file}: {error}") from error
    for name, matrix in matrices.items():
        found = _MATRIX.fullmatch(name)
        weight = weights.get(f"{found[1]}.weight") if found else None
        if found is None or weight is None or weight.type not in _UNPACKED:
            continue
        # A has the columns of the weight that it changes, B its rows.
        axis = 1 if found[2] == "A" else 0
        if len(matrix.shape) != 2 or matrix.shape[axis] != weight.shape[axis]:
            raise ModelError(
                f"the adapter '{adapter.name}': the shape {list(matrix.shape)} of its {name!r} does not fit the base "
                f"model's {list(weight.shape)}; it was made for another model"
            )


def called(name: str, adapter: AdapterFile) -> str:
    """What vLLM calls an adapter: each version has a name of its own, so that requests finish with theirs.

    Of one name it would change the weights below them; and what is loaded in place it reads anew in every step.
    """
    version = hashlib.sha256(f"{adapter.path}\n{adapter.digest}".encode()).hexdigest()
    return f"{name}#{version[:_VERSION_DIGITS]}"


def without_versions(text: str) -> str:
    """A text of vLLM's with the adapters' own names."""
    return _VERSION.sub("", text)


def slots_of(model: VllmModel, *, on_gpu: bool) -> int:
    """For how many adapters there are places in one batch; 0: for none, ever."""
    if not model.adapters and not model.adapter_slots:
        return 0
    slots = model.adapter_slots or _SLOTS
    # On a card they change places with those in main memory; on a CPU all that there are have one, and one more
    # is for the next version of one of them.
    while not on_gpu and slots <= len(model.adapters):
        slots *= 2
    return slots


def room_of(model: VllmModel, *, on_gpu: bool) -> AdapterRoom:
    """What can be added to an engine that is started now. Raises :class:`ModelError`."""
    slots = slots_of(model, on_gpu=on_gpu)
    rank = rank_of(model)
    return AdapterRoom(
        most=None if slots and on_gpu else slots,
        fits=lambda adapter: _rank(adapter) <= rank,
        called=called,
    )


def rank_of(model: VllmModel) -> int:
    """Room for the ranks of all adapters, and for those that may be added. Raises :class:`ModelError`."""
    highest = max([model.adapter_rank, *map(_rank, model.adapters)])
    fitting = [rank for rank in _RANKS if rank >= highest]
    if not fitting:
        raise ModelError(f"an adapter's rank is {highest}; vLLM takes {_RANKS[-1]} at most")
    return fitting[0]


def _rank(adapter: AdapterConfig) -> int:
    config = _config(adapter)
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    return max(map(int, ranks))


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
