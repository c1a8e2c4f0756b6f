"""What is tuned: which model, from what settings on, over which spaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from serving.config import (
    Config,
    ConfigError,
    GgufModel,
    LlamaCppModel,
    LlamaServerModel,
    ModelConfig,
    VllmModel,
)
from serving.engines.fitting import Fitting
from serving.engines.footprint import contents_of
from serving.engines.launch import Launcher
from serving.hardware.catalog import UnknownCard, find_card
from serving.hardware.memory import gpus, host_free_mib
from serving.models.architecture import Architecture
from serving.models.catalog import find_model
from serving.models.requantize import type_name
from serving.planner.memory import Offload
from serving.planner.published import source_of
from serving.planner.rig import Rig, RigError, this_rig
from serving.planner.settings import Settings
from serving.planner.speed import speed_of
from serving.planner.subject import of_catalog
from serving.planner.weights import predicted
from serving.tuning.bench import Work
from serving.tuning.space import Space, gguf_space, types_for, vllm_space

Launchers = Mapping[str, Launcher[Any]]
# What is predicted to be so many times slower than the default is not tried.
_MOST_TIMES_SLOWER = 2.5
_WHOLE_TYPES = ("F32", "F16", "BF16")


class TuneError(Exception):
    """It cannot be tuned; the message names the argument and the mend."""


def default_of(name: str, config: Config, source: str | None) -> ModelConfig:
    """A model of the config by its name or alias, or one of the catalog or a file, with what keys are by default.

    Raises :class:`TuneError`.
    """
    for model in config.local_models:
        if name == model.name or name in model.aliases:
            if source is not None:
                raise TuneError(f"--source: {name} is a model of the config, which has its source")
            return model
    found = find_model(name)
    if found is not None:
        if source is None:
            published = (source_of(found.name, mixture) for mixture in of_catalog(found).mixtures)
            source = next((file for each in published if each for file in each[:1]), None)
        if source is None:
            raise TuneError(
                f"no GGUF file of {found.name} is known; say where one is with --source hf://ORG/REPO/FILE.gguf"
            )
        return LlamaCppModel(name=found.name, source=source)
    if "/" in name or name.endswith(".gguf"):
        return LlamaCppModel(
            name=name.rpartition("/")[2].removesuffix(".gguf"), source=source or name
        )
    raise TuneError(
        f"{name} is no model of the config, nor of the catalog. Of others give the 'source': a path, "
        "hf://ORG/REPO/FILE.gguf, package://PACKAGE/FILE.gguf"
    )


def filled(model: ModelConfig, config: Config, launchers: Launchers) -> ModelConfig:
    """The model with numbers instead of ``auto``, its files here; raises ``ConfigError``, ``ModelError``."""
    alone = config.model_copy(update={"models": (model,), "routes": ()})
    [only] = Fitting(alone, launchers, host_free_mib()).fill(fetch=True).config.local_models
    return only


def fit_check(config: Config, launchers: Launchers) -> Callable[[ModelConfig], str | None]:
    """Says why a model cannot fit on this machine, by the planner's memory model; None if it may."""

    free_mib = host_free_mib()

    def fits(model: ModelConfig) -> str | None:
        alone = config.model_copy(update={"models": (model,), "routes": ()})
        try:
            Fitting(alone, launchers, free_mib).check()
        except ConfigError as error:
            return error.problems[0].message
        return None

    return fits


def spaces_of(
    default: ModelConfig,
    engines: Sequence[str],
    config: Config,
    launchers: Launchers,
    work: Work,
    *,
    most_loss: float,
    keep_quantization: bool,
) -> list[Space]:
    """What to try, engine by engine, the default's first. Raises :class:`TuneError`, ``ModelError``."""
    return [
        _vllm(default, work)
        if engine == "vllm"
        else _gguf(
            default, engine, config, launchers, work,
            most_loss=most_loss, keep_quantization=keep_quantization,
        )
        for engine in engines
    ]  # fmt: skip


def _gguf(
    default: ModelConfig,
    engine: str,
    config: Config,
    launchers: Launchers,
    work: Work,
    *,
    most_loss: float,
    keep_quantization: bool,
) -> Space:
    if not isinstance(default, LlamaCppModel | LlamaServerModel) or default.engine != engine:
        raise TuneError(
            f"--engine {engine}: {default.name} is a model of {default.engine}; give the source of a GGUF file"
        )
    contents = contents_of(launchers[engine].prepare(default))
    architecture = contents.model.architecture
    if architecture.is_encoder:
        raise TuneError(f"{default.name} makes embeddings; chats are what is measured")
    current = default.quantization or type_name(contents.model.gguf[0].header.file_type)
    types = [] if keep_quantization else list(types_for(current, most_loss))
    rig = _rig(config)
    uses_cards = launchers[engine].uses_gpus and bool(rig.cards) and not default.is_for_cpu
    if not uses_cards:
        rig = Rig(rig.host)
    speeds = {
        name: _tokens_per_second(architecture, name, rig, default, work)
        for name in (current, *types)
        if name is not None
    }
    expected = {
        ("quantization", name): math.log(speeds[name] / speeds[current])
        for name in types
        if current in speeds
    }
    slowest = -math.log(_MOST_TIMES_SLOWER)
    return gguf_space(
        default,
        users=work.users,
        types=[name for name in types if expected.get(("quantization", name), 0.0) > slowest],
        computes_on_cpu=not uses_cards or default.gpu_layers >= 0,
        expected=expected,
    )


def _tokens_per_second(
    architecture: Architecture, mixture: str, rig: Rig, model: GgufModel, work: Work
) -> float:
    """What the planner predicts for all users together."""
    shares = tuple(float(card.memory_bytes) for card in rig.cards)
    layers = None if model.gpu_layers < 0 else model.gpu_layers
    return speed_of(
        architecture,
        predicted(architecture, mixture),
        rig,
        Offload(shares, layers) if shares else Offload(),
        Settings(model.context_length, work.users, batch_tokens=model.max_batch_tokens),
        users=work.users,
        context_tokens=work.prompt_tokens + work.output_tokens,
        is_quantized=mixture not in _WHOLE_TYPES,
    ).all_users


def _rig(config: Config) -> Rig:
    memory = config.memory
    try:
        return this_rig(reserve_mib=memory.reserve_mib, gpu_reserve_mib=memory.gpu_reserve_mib)
    except RigError as error:
        raise TuneError(str(error)) from error


def _vllm(default: ModelConfig, work: Work) -> Space:
    base = default
    if isinstance(default, GgufModel):
        base = VllmModel(
            name=default.name,
            engine="vllm",
            source=default.source,
            context_length=default.context_length,
            max_sequences=default.max_sequences,
        )
    assert isinstance(base, VllmModel)
    cards = [] if base.is_for_cpu else gpus()
    kernels = set(_vllm_kernels(card.name for card in cards))
    return vllm_space(
        base, users=work.users, has_cards=bool(cards), computes_fp8="fp8_w8a8" in kernels
    )


def _vllm_kernels(names: Iterator[str]) -> Iterator[str]:
    for name in names:
        try:
            yield from find_card(name).architecture.kernels.get("vllm", ())
        except UnknownCard:
            continue
