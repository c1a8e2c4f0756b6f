"""The file that an adapter is served from, made ready for llama.cpp."""

from __future__ import annotations

import hashlib
from pathlib import Path

import filelock

from serving.folders import make_private
from serving.models.adapters import UnfitAdapter, check_adapter
from serving.models.checksums import digest_of
from serving.models.gguf import GgufError, read_header
from serving.models.peft import convert_adapter
from serving.models.sources import ModelError


def prepare_adapter(path: Path, base: Path, cache_dir: Path) -> Path:
    """An adapter as a GGUF file that fits the model ``base``: the file itself, or what is made of a PEFT folder.

    That is made once for each content of the folder and header of the base, and kept in ``cache_dir``, where its
    owner alone can read it. Raises :class:`ModelError`.
    """
    try:
        file = _converted(path, base, cache_dir / "adapters") if path.is_dir() else path
        check_adapter(file, base)
    except (UnfitAdapter, GgufError) as error:
        raise ModelError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ModelError(f"cannot prepare {path}:{where} {error.strerror or error}") from error
    return file


def _converted(folder: Path, base: Path, cache_dir: Path) -> Path:
    make_private(cache_dir)
    content = digest_of(folder, cache_dir)
    with base.open("rb") as file:
        header = hashlib.sha256(file.read(read_header(base).data_offset_bytes)).hexdigest()
    target = cache_dir / f"{folder.name}-{content[:16]}-{header[:16]}.gguf"
    with filelock.FileLock(cache_dir / ".lock"):
        if not target.exists():
            for stale in cache_dir.glob("*.partial"):
                stale.unlink()
            convert_adapter(folder, base, target)
    return target
