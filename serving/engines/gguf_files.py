"""The files that llama.cpp serves a model from, whichever process it is in."""

from __future__ import annotations

from pathlib import Path

from serving.config import AdapterConfig, GgufModel, LlamaCppModel
from serving.engines.launch import AdapterFile, Files
from serving.models.adapter_files import prepare_adapter
from serving.models.checksums import digest_of, verify
from serving.models.gguf import GgufError, read_header
from serving.models.requantize import prepare
from serving.models.sources import ModelError, resolve


def files_of(model: GgufModel, cache_dir: Path) -> Files:
    """A model's files: found or downloaded, compared with their checksums, requantized and converted as need be.

    May take long. Raises :class:`ModelError`.
    """
    file = prepare(
        _checked(model.source, model.sha256, cache_dir, "sha256"), model.quantization, cache_dir
    )
    projector = draft_model = None
    if model.projector is not None:
        projector = _checked(model.projector, model.projector_sha256, cache_dir, "projector_sha256")
    if isinstance(model, LlamaCppModel) and model.draft_model is not None:
        draft_model = _checked(
            model.draft_model, model.draft_model_sha256, cache_dir, "draft_model_sha256"
        )
    pooling = _pooling_of(file)
    if pooling and model.adapters:
        raise ModelError("adapters are served beside generating models only; leave them out")
    return Files(
        file,
        projector=projector,
        draft_model=draft_model,
        pooling=pooling,
        adapters={each.name: _adapter(each, file, cache_dir) for each in model.adapters},
    )


def _checked(source: str, sha256: str | None, cache_dir: Path, key: str) -> Path:
    path = resolve(source)
    verify(path, sha256, cache_dir, key)
    return path


def _adapter(adapter: AdapterConfig, base: Path, cache_dir: Path) -> AdapterFile:
    path = Path(adapter.path)
    try:
        verify(path, adapter.sha256, cache_dir, "sha256")
        file = prepare_adapter(path, base, cache_dir)
        return AdapterFile(file, adapter.scale, digest_of(path, cache_dir))
    except (ModelError, OSError) as error:
        raise ModelError(f"the adapter '{adapter.name}': {error}") from error


def _pooling_of(file: Path) -> int | None:
    try:
        header = read_header(file)
    except (GgufError, OSError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    return header.integer(f"{header.text('general.architecture')}.pooling_type")
