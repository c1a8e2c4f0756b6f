"""Whether the models of a config fit on this machine, and numbers for those that the config leaves to us (``auto``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import try_to_load_from_cache

from serving.config import Auto, Config, ConfigError, GgufModel, MemoryConfig, ModelConfig, Problem
from serving.engines.footprint import Description, describe_files, footprint_of
from serving.engines.launch import Footprint, Launcher
from serving.engines.placement import HOST, Device, Need, can_ever_fit
from serving.hardware.memory import gpus, host_total_mib
from serving.models.hub import HubSource
from serving.models.sources import ModelError

_LONGEST_CONTEXTS = (131072, 65536, 32768, 16384, 8192, 4096, 2048)
_MOST_SEQUENCES = (16, 8, 4, 2, 1)
# What a chat needs, before more sequences are worth more.
_CHAT_CONTEXT = 8192
_CELLS = 256


@dataclass(frozen=True, slots=True)
class Filled:
    """A config whose numbers are all there, and what was found for each model that had an ``auto``."""

    config: Config
    found: tuple[str, ...]


def fill(config: Config, launchers: Mapping[str, Launcher[Any]], *, fetch: bool) -> Filled:
    """Find numbers for ``auto``: as many as fit beside the models that are loaded with it.

    With ``fetch`` files that are not here are downloaded, which may take long; else their models keep their
    placeholders, and a line says so. Raises ``ModelError``, and ``ConfigError`` for a model that does not fit.
    """
    models, found = list(config.models), []
    for index, model in enumerate(config.models):
        if not isinstance(model, GgufModel) or not _open_keys(model):
            continue
        launcher = launchers[model.engine]
        description = _description(model, launcher, fetch=fetch)
        if description is None:
            found.append(f"{model.name}: auto is found once {model.source} is here")
            continue
        devices = _left(config, launchers, models, index)
        filled = _Filler(model, description, devices, launcher).fill()
        if filled is None:
            raise ConfigError([_too_large(model, index, description, devices, launcher)])
        models[index] = filled
        numbers = ", ".join(f"{key}: {getattr(filled, key)}" for key in _open_keys(model))
        found.append(f"{model.name}: {numbers} (auto; memory is estimated)")
    return Filled(config.model_copy(update={"models": tuple(models)}), tuple(found))


def misfits(config: Config, launchers: Mapping[str, Launcher[Any]]) -> Iterator[Problem]:
    """The models whose files are here and that cannot fit on this machine, each alone; raises ``ModelError``."""
    devices = devices_of(config.memory, launchers)
    for index, model in enumerate(config.models):
        if not isinstance(model, GgufModel):
            continue
        launcher = launchers[model.engine]
        description = _description(model, launcher, fetch=False)
        if description is not None and not _fits(model, description, devices, launcher):
            yield _too_large(model, index, description, devices, launcher)


def devices_of(memory: MemoryConfig, launchers: Mapping[str, Launcher[Any]]) -> list[Device]:
    """What engines may have of main memory, and of each card that some engine can use."""
    budget_mib = memory.budget_mib
    if budget_mib is None:
        budget_mib = host_total_mib() - memory.reserve_mib
    cards = gpus() if any(launcher.uses_gpus for launcher in launchers.values()) else []
    return [
        Device(HOST, budget_mib),
        *(Device(card.uuid, card.total_mib - memory.gpu_reserve_mib) for card in cards),
    ]


def _open_keys(model: GgufModel) -> tuple[str, ...]:
    keys = ("context_length", "max_sequences", "gpu_layers")
    return tuple(key for key in keys if isinstance(getattr(model, key), Auto))
