"""How much memory a llama.cpp engine will take, before it runs: the planner's estimate, for the model of a config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from serving.config import GgufModel, LlamaCppModel
from serving.engines.launch import Files, Footprint
from serving.models.description import ModelDescription, describe
from serving.planner.memory import Extras, Offload, Parts, memory_of
from serving.planner.settings import Settings
from serving.planner.weights import ModelWeights, of_files

MIB = 2**20
# What a draft model is given to work on at once.
_DRAFT_BATCH_TOKENS = 512


def of_gguf(model: GgufModel, files: Files, *, on_gpu: bool) -> Footprint:
    """An upper estimate for a model that ``files`` hold; ``memory_mib`` of the config overrules it.

    Reads the files' headers; raises ``ModelError``.
    """
    described = describe(str(files.model))
    memory = memory_of(
        described.architecture,
        _weights(described),
        settings_of(model, described),
        # One share: how it is split over several cards is for placement to say.
        Offload((1.0,) if on_gpu else (), None if model.gpu_layers < 0 else model.gpu_layers),
        _extras(model, files),
    )
    gpu_bytes = sum(parts.total for parts in memory.cards)
    # Buffers are taken when they are first filled.
    growth_mib = _mib(memory.host.compute) + model.prefix_cache_mib
    host_mib = _mib(memory.host.total) + model.prefix_cache_mib
    found = Footprint(host_mib, _mib(gpu_bytes), growth_mib)
    if model.memory_mib is None:
        return found
    if found.gpu_mib:
        return replace(found, gpu_mib=model.memory_mib, source="configured")
    return replace(found, host_mib=model.memory_mib, source="configured")


def settings_of(model: GgufModel, described: ModelDescription) -> Settings:
    """What a config's model asks its engine to hold."""
    is_ours = isinstance(model, LlamaCppModel)
    if is_ours and _is_pooled(described):
        # Texts are read whole, one or several at a time.
        tokens = max(model.max_batch_tokens, model.context_length)
        return Settings(tokens, batch_tokens=tokens, is_pooled=True)
    return Settings(
        context_length=model.context_length,
        slots=model.max_sequences,
        batch_tokens=model.max_batch_tokens,
        pool_tokens=model.kv_tokens if isinstance(model, LlamaCppModel) else None,
        has_full_windows=is_ours,
    )


def _extras(model: GgufModel, files: Files) -> Extras:
    return Extras(
        adapters_bytes=sum(Path(adapter.path).stat().st_size for adapter in model.adapters),
        projector_bytes=None if files.projector is None else files.projector.stat().st_size,
        draft=_draft(files.draft_model, model.context_length) if files.draft_model else Parts(),
    )


def _draft(path: Path, context_length: int) -> Parts:
    described = describe(str(path))
    settings = Settings(context_length, batch_tokens=_DRAFT_BATCH_TOKENS)
    host = memory_of(described.architecture, _weights(described), settings).host
    return replace(host, overhead=0)  # it is in the same process


def _weights(described: ModelDescription) -> ModelWeights:
    parts = ((part.header, part.size_bytes) for part in described.gguf)
    return of_files(parts, len(described.architecture.layers))


def _is_pooled(described: ModelDescription) -> bool:
    key = f"{described.architecture.family}.pooling_type"
    return described.gguf[0].header.integer(key) is not None


def _mib(size_bytes: float) -> int:
    return int(-(-size_bytes // MIB))
