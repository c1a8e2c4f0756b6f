"""The files that llama.cpp serves a model from, whichever process it is in."""

from __future__ import annotations

from pathlib import Path

from serving.config import GgufModel, LlamaCppModel
from serving.engines.adapters import adapter_file
from serving.engines.launch import Files
from serving.models.adapter_files import prepare_adapter
from serving.models.checksums import verify
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
        adapters={
            each.name: adapter_file(
                each, cache_dir, lambda path: prepare_adapter(path, file, cache_dir)
            )
            for each in model.adapters
        },
    )


def _checked(source: str, sha256: str | None, cache_dir: Path, key: str) -> Path:
    path = resolve(source)
    verify(path, sha256, cache_dir, key)
    return path


def _pooling_of(file: Path) -> int | None:
    try:
        header = read_header(file)
    except (GgufError, OSError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    return header.integer(f"{header.text('general.architecture')}.pooling_type")
