"""Whether the models of a config fit on this machine, and numbers for those that the config leaves to us (``auto``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.config import (
    AnyModel,
    Auto,
    Config,
    ConfigError,
    LlamaCppModel,
    LlamaServerModel,
    MemoryConfig,
    Problem,
)
from serving.engines.footprint import Contents, contents_here, contents_of, footprint_of
from serving.engines.launch import Footprint, Launcher
from serving.engines.placement import HOST, Device, Need, Plan, Resident, place
from serving.hardware.memory import Gpu, gpus, host_total_mib
from serving.models.sources import ModelError

_LONGEST_CONTEXTS = (131072, 65536, 32768, 16384, 8192, 4096, 2048)
_MOST_SEQUENCES = (16, 8, 4, 2, 1)
# What a chat needs, before more sequences are worth more.
_CHAT_CONTEXT = 8192
_CELLS = 256
# Those whose memory depends on files and settings that are known here.
_Model = LlamaCppModel | LlamaServerModel
_WITH_FILES = (LlamaCppModel, LlamaServerModel)
_OPEN_KEYS = ("context_length", "max_sequences", "gpu_layers")


@dataclass(frozen=True, slots=True)
class Filled:
    """A config whose numbers are all there, and a line for each model that had an ``auto``."""

    config: Config
    lines: tuple[str, ...]


class Fitting:
    """Knows this machine's memory, and what the models of a config need of it."""

    def __init__(
        self, config: Config, launchers: Mapping[str, Launcher[Any]], host_mib: int | None = None
    ) -> None:
        """``launchers`` by the config's ``engine`` names; ``host_mib`` of main memory are there, all of it if None."""
        self._config = config
        self._launchers = launchers
        self._cards = gpus() if any(each.uses_gpus for each in launchers.values()) else []
        self._devices = _devices(
            config.memory, self._cards, host_total_mib() if host_mib is None else host_mib
        )

    def check(self) -> tuple[str, ...]:
        """A line for each model of which it cannot be told whether it fits, since its files are not here.

        Raises ``ConfigError`` with those that do not fit on this machine even alone.
        """
        problems, lines = [], []
        for index, model in enumerate(self._config.models):
            if not isinstance(model, _WITH_FILES):
                continue
            try:
                contents = contents_here(model)
            except ModelError as error:
                lines.append(f"{model.name}: cannot tell whether it fits: {error}")
                continue
            if contents is None:
                lines.append(
                    f"{model.name}: whether it fits is known once it is here; before, `rigserve plan {model.source}` tells"
                )
            elif not self._fits(model, contents, ()):
                problems.append(self._too_large(index, model, contents, ()))
        if problems:
            raise ConfigError(problems)
        return tuple(lines)

    def fill(self, *, fetch: bool) -> Filled:
        """Find numbers for ``auto``: as much as fits beside the models that are loaded at the start.

        With ``fetch`` files that are not here are downloaded, which may take long; else their models keep
        placeholders. Raises ``ModelError``, and ``ConfigError`` for a model that does not fit at all.
        """
        models, lines = list(self._config.models), []
        for index, model in enumerate(self._config.models):
            if not isinstance(model, _WITH_FILES) or not _open_keys(model):
                continue
            contents = self._contents(model, fetch=fetch)
            if contents is None:
                lines.append(f"{model.name}: auto is found once {model.source} is here")
                continue
            others = self._residents(each for each in models if each is not model)
            filled = self._filled(model, contents, others)
            if filled is None:
                raise ConfigError([self._too_large(index, model, contents, others)])
            models[index] = filled
            numbers = ", ".join(f"{key}: {getattr(filled, key)}" for key in _open_keys(model))
            needs = _shown(self._footprint(filled, contents))
            lines.append(f"{model.name}: {numbers} (auto); {needs}")
        return Filled(self._config.model_copy(update={"models": tuple(models)}), tuple(lines))

    def _filled(
        self, model: _Model, contents: Contents, others: Sequence[Resident]
    ) -> _Model | None:
        """All layers on cards if that goes, then sequences for chats, then the longest context."""
        longest = self._longest(model, contents)
        layers = len(contents.model.architecture.layers)
        choices: dict[str, list[int]] = {
            "gpu_layers": [-1, *range(layers, -1, -1)],
            "max_sequences": list(_MOST_SEQUENCES),
            "context_length": [longest, *(each for each in _LONGEST_CONTEXTS if each < longest)],
        }
        is_open = isinstance(model.context_length, Auto)
        least = model
        if is_open:
            least = model.model_copy(update={"context_length": min(model.context_length, longest)})
        for key in ("gpu_layers", "max_sequences", "context_length"):
            if not isinstance(getattr(model, key), Auto):
                continue
            trial = least
            if key == "max_sequences" and is_open:
                # Slots are for chats; longer texts come after them.
                trial = least.model_copy(update={"context_length": min(_CHAT_CONTEXT, longest)})
            number = next(
                (
                    each
                    for each in choices[key]
                    if self._fits(trial.model_copy(update={key: each}), contents, others)
                ),
                None,
            )
            if number is not None:
                least = least.model_copy(update={key: number})
        return least if self._fits(least, contents, others) else None

    def _longest(self, model: _Model, contents: Contents) -> int:
        """The context that it was trained for, or that a shared pool can hold, in whole blocks of cells."""
        longest = min(contents.model.architecture.context_length, _LONGEST_CONTEXTS[0])
        if isinstance(model, LlamaCppModel) and model.kv_tokens is not None:
            longest = min(longest, model.kv_tokens)
        return max(longest // _CELLS, 1) * _CELLS

    def _contents(self, model: _Model, *, fetch: bool) -> Contents | None:
        if fetch:
            return contents_of(self._launchers[model.engine].prepare(model))
        return contents_here(model)

    def _residents(self, models: Iterable[AnyModel]) -> list[Resident]:
        """Those that are loaded with the server, where they would go; one that is not here takes nothing."""
        residents: list[Resident] = []
        for model in models:
            if not isinstance(model, _WITH_FILES) or model.load != "preload":
                continue
            contents = contents_here(model)
            found = contents and self._place(model, contents, residents)
            if found:
                residents.append(Resident(model.name, found.shares_mib, may_leave=False))
        return residents

    def _fits(self, model: _Model, contents: Contents, others: Sequence[Resident]) -> bool:
        return self._place(model, contents, others) is not None

    def _place(self, model: _Model, contents: Contents, others: Sequence[Resident]) -> Plan | None:
        needs = self._footprint(model, contents)
        need = Need(model.name, needs.host_mib, needs.gpu_mib, self._may_use(model))
        return place(need, self._devices, others)

    def _footprint(self, model: _Model, contents: Contents) -> Footprint:
        try:
            return footprint_of(model, contents, on_gpu=bool(self._may_use(model)))
        except OSError as error:
            raise ModelError(f"cannot read {error.filename}: {error.strerror}") from error

    def _may_use(self, model: _Model) -> tuple[str, ...]:
        if model.is_for_cpu or not self._launchers[model.engine].uses_gpus:
            return ()
        return tuple(
            card.uuid
            for card in self._cards
            if not model.devices or {str(card.index), card.uuid} & set(model.devices)
        )

    def _too_large(
        self, index: int, model: _Model, contents: Contents, others: Sequence[Resident]
    ) -> Problem:
        there = ", ".join(
            f"{'main memory' if device.id == HOST else device.id}: {device.budget_mib:,} MiB"
            for device in self._devices
        )
        beside = f" beside {', '.join(each.id for each in others)}" if others else ""
        return Problem(
            Path("config"),
            None,
            f"models[{index}]",
            f"{model.name} does not fit{beside}: it needs {_shown(self._footprint(model, contents))}; for engines "
            f"there are {there}. Serve less of it (quantization, context_length, max_sequences, "
            "prefix_cache_mib, gpu_layers; `rigserve plan` shows what fits), or correct the figures: memory_mib "
            "of the model, memory.budget_mib",
        )


def _devices(memory: MemoryConfig, cards: Sequence[Gpu], host_mib: int) -> list[Device]:
    """What engines may have, were nothing else running on the cards."""
    budget_mib = memory.budget_mib
    if budget_mib is None:
        budget_mib = host_mib - memory.reserve_mib
    return [
        Device(HOST, budget_mib),
        *(Device(card.uuid, card.total_mib - memory.gpu_reserve_mib) for card in cards),
    ]


def _open_keys(model: _Model) -> tuple[str, ...]:
    return tuple(key for key in _OPEN_KEYS if isinstance(getattr(model, key), Auto))


def _shown(needs: Footprint) -> str:
    on_gpus = f" and {needs.gpu_mib:,} MiB of cards" if needs.gpu_mib else ""
    return f"{needs.host_mib:,} MiB of main memory{on_gpus} ({needs.source})"
