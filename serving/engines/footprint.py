"""How much memory a llama.cpp engine will take, before it runs: the planner's estimate, for the model of a config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from serving.config import GgufModel, LlamaCppModel
from serving.engines.launch import Files, Footprint
from serving.models.description import ModelDescription, describe
from serving.models.hub import HubSource
from serving.models.requantize import type_name
from serving.models.sources import ModelError, local_path
from serving.planner.memory import Extras, Offload, Parts, memory_of, vocabulary_bytes
from serving.planner.settings import SCORED_ROWS, Settings
from serving.planner.weights import ModelWeights, of_files, predicted

MIB = 2**20
# What a draft model is given to work on at once.
_DRAFT_BATCH_TOKENS = 512
# Of one slot, as the engine has it.
LONGEST_DRAFT = 31


@dataclass(frozen=True, slots=True)
class Contents:
    """What an engine's files hold, as far as memory depends on it."""

    model: ModelDescription
    weights: ModelWeights
    projector_bytes: int | None = None
    draft: ModelDescription | None = None
    adapters_bytes: int = 0


def of_gguf(model: GgufModel, files: Files, *, on_gpu: bool) -> Footprint:
    """An upper estimate for a model that ``files`` hold; ``memory_mib`` of the config overrules it.

    Reads the files' headers; raises ``ModelError`` and OSError.
    """
    return footprint_of(model, contents_of(files), on_gpu=on_gpu)


def contents_of(files: Files) -> Contents:
    """What is in files that have been prepared; raises ``ModelError``."""
    described = describe(str(files.model))
    return Contents(
        described,
        _weights(described),
        None if files.projector is None else files.projector.stat().st_size,
        None if files.draft_model is None else describe(str(files.draft_model)),
        sum(adapter.path.stat().st_size for adapter in files.adapters.values()),
    )


def contents_here(model: GgufModel) -> Contents | None:
    """What its files will hold once they are prepared; None if one of them is still to be downloaded.

    Raises ``ModelError``, and OSError for an adapter that is not there.
    """
    paths = [_here(source) for source in (model.source, model.projector)]
    draft = _here(model.draft_model) if isinstance(model, LlamaCppModel) else None
    if paths[0] is None or (model.projector and paths[1] is None):
        return None
    if isinstance(model, LlamaCppModel) and model.draft_model and draft is None:
        return None
    contents = contents_of(Files(paths[0], paths[1], draft))
    adapters_bytes = sum(_size_bytes(Path(adapter.path)) for adapter in model.adapters)
    contents = replace(contents, adapters_bytes=adapters_bytes)
    file_type = type_name(contents.model.gguf[0].header.file_type)
    if model.quantization in (None, file_type):
        return contents
    weights = predicted(contents.model.architecture, model.quantization)
    return replace(contents, weights=weights)


def footprint_of(model: GgufModel, contents: Contents, *, on_gpu: bool) -> Footprint:
    """An upper estimate for a model's settings."""
    memory = memory_of(
        contents.model.architecture,
        contents.weights,
        _settings(model, contents.model),
        # One share: how it is split over several cards is for placement to say.
        Offload((1.0,) if on_gpu else (), None if model.gpu_layers < 0 else model.gpu_layers),
        Extras(
            adapters_bytes=contents.adapters_bytes,
            projector_bytes=contents.projector_bytes,
            draft=_draft(contents.draft, model.context_length) if contents.draft else Parts(),
        ),
    )
    gpu_bytes = sum(parts.total for parts in memory.cards)
    # Weights and cells are there from the start; all else is taken when it is first filled.
    growth_mib = _mib(memory.host.total - memory.host.weights - memory.host.cache)
    growth_mib += model.prefix_cache_mib
    host_mib = _mib(memory.host.total) + model.prefix_cache_mib
    found = Footprint(host_mib, _mib(gpu_bytes), growth_mib)
    if model.memory_mib is None:
        return found
    if found.gpu_mib:
        return replace(found, gpu_mib=model.memory_mib, source="configured")
    return replace(found, host_mib=model.memory_mib, source="configured")


def _here(source: str | None) -> Path | None:
    """The file that a source names, if it is on this machine."""
    if source is None:
        return None
    if not HubSource.is_one(source):
        return local_path(source)
    hub = HubSource.parse(source)
    if hub.file is None:
        raise ModelError(f"{source} names no file; name one: {source}/FILE.gguf")
    cached = try_to_load_from_cache(hub.repo_id, hub.file, revision=hub.revision)
    return Path(cached) if isinstance(cached, str) else None


def _settings(model: GgufModel, described: ModelDescription) -> Settings:
    is_ours = isinstance(model, LlamaCppModel)
    if is_ours and _is_pooled(described):
        # Texts are read whole, one or several at a time.
        tokens = max(model.max_batch_tokens, model.context_length)
        return Settings(tokens, batch_tokens=tokens, is_pooled=True)
    speculation = model.speculation if isinstance(model, LlamaCppModel) else "none"
    drafted_rows = {
        "prompt_lookup": LONGEST_DRAFT * model.max_sequences,
        "draft_model": LONGEST_DRAFT,
    }
    return Settings(
        context_length=model.context_length,
        slots=model.max_sequences,
        batch_tokens=model.max_batch_tokens,
        pool_tokens=model.kv_tokens if isinstance(model, LlamaCppModel) else None,
        key_type=model.kv_type,
        value_type=model.kv_type,
        has_flash_attention=model.flash_attention,
        has_full_windows=is_ours,
        scored_rows=max(SCORED_ROWS, drafted_rows.get(speculation, 0)),
        has_lookup=speculation == "prompt_lookup",
    )


def _draft(described: ModelDescription, context_length: int) -> Parts:
    settings = Settings(context_length, batch_tokens=_DRAFT_BATCH_TOKENS)
    host = memory_of(described.architecture, _weights(described), settings).host
    # It is in the same process.
    return replace(host, overhead=vocabulary_bytes(described.architecture))


def _weights(described: ModelDescription) -> ModelWeights:
    if not described.gguf:
        raise ModelError(f"{described.source} is not a GGUF file")
    parts = ((part.header, part.size_bytes) for part in described.gguf)
    return of_files(parts, len(described.architecture.layers))


def _is_pooled(described: ModelDescription) -> bool:
    key = f"{described.architecture.family}.pooling_type"
    return described.gguf[0].header.integer(key) is not None


def _size_bytes(adapter: Path) -> int:
    """Of a GGUF file, or of the weights in a PEFT folder, which is about what it is converted to."""
    files = adapter.glob("*.safetensors") if adapter.is_dir() else [adapter]
    return sum(file.stat().st_size for file in files)


def _mib(size_bytes: float) -> int:
    return int(-(-size_bytes // MIB))
