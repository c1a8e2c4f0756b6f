"""What a model is, read from where it is: GGUF files or a folder of safetensors, here, on the Hub, or at an address.

Of what is elsewhere only the headers are fetched. Nothing is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import NotASafetensorsRepoError

from serving.models.architecture import Architecture, UnreadArchitecture
from serving.models.gguf import GgufError, Header, read_header
from serving.models.gguf_architecture import architecture_of_header
from serving.models.hf_config import architecture_of
from serving.models.hub import HubSource, hub_errors
from serving.models.remote import RemoteError, RemoteFile, read_remote_header
from serving.models.safetensors import SafetensorsError, StoredTensor, read_safetensors
from serving.models.sources import ModelError, local_path
from serving.models.split import split_names

_CONFIG = "config.json"
_WEB = ("https://", "http://")


@dataclass(frozen=True, slots=True)
class GgufPart:
    """One of a model's GGUF files."""

    name: str
    header: Header
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model, and what its files hold: ``gguf`` has more than one if it is split, or ``safetensors`` its tensors."""

    source: str
    architecture: Architecture
    gguf: tuple[GgufPart, ...] = ()
    safetensors: Mapping[str, StoredTensor] | None = None


def describe(source: str) -> ModelDescription:
    """Read what ``source`` names, without downloading it; raises :class:`ModelError`.

    It is as in a config (``hf://ORG/REPO/FILE.gguf``, ``package://PACKAGE/FILE``, a path), or a folder with
    ``config.json`` and safetensors, here or on the Hub (``hf://ORG/REPO``), or the address of a GGUF file.
    """
    try:
        if source.startswith(_WEB):
            return _of_parts(source, [_remote_part(RemoteFile(url)) for url in split_names(source)])
        if HubSource.is_one(source):
            return _on_hub(source, HubSource.parse(source))
        path = local_path(source)
        if path.is_dir():
            return _in_folder(source, path)
        return _of_parts(source, [_local_part(Path(name)) for name in split_names(str(path))])
    except (GgufError, SafetensorsError, RemoteError, UnreadArchitecture) as error:
        raise ModelError(f"{source}: {error}") from error
    except OSError as error:
        raise ModelError(f"{source}: {error.strerror or error}") from error


def _local_part(path: Path) -> GgufPart:
    return GgufPart(path.name, read_header(path), path.stat().st_size)


def _remote_part(file: RemoteFile) -> GgufPart:
    header, size_bytes = read_remote_header(file)
    return GgufPart(file.url.rpartition("/")[2], header, size_bytes)


def _of_parts(source: str, parts: list[GgufPart]) -> ModelDescription:
    first = parts[0].header
    tensors = {name: tensor for part in parts for name, tensor in part.header.tensors.items()}
    whole = Header(first.values, tensors, first.data_offset_bytes)
    return ModelDescription(source, architecture_of_header(whole), tuple(parts))


def _in_folder(source: str, folder: Path) -> ModelDescription:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_safetensors(file)
    return _of_config(source, folder / _CONFIG, tensors)


def _of_config(source: str, config: Path, tensors: Mapping[str, StoredTensor]) -> ModelDescription:
    try:
        read = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{source}: its {_CONFIG} is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{source}: its {_CONFIG} is no JSON object")
    return ModelDescription(source, architecture_of(read), safetensors=tensors)


def _on_hub(source: str, hub: HubSource) -> ModelDescription:
    if hub.file is not None:
        return _of_parts(source, [_hub_part(hub, name) for name in split_names(hub.file)])
    with hub_errors(str(replace(hub, file=_CONFIG))):
        config = Path(hf_hub_download(hub.repo_id, _CONFIG, revision=hub.revision))
    with hub_errors(source):
        try:
            metadata = HfApi().get_safetensors_metadata(hub.repo_id, revision=hub.revision)
        except NotASafetensorsRepoError as error:
            raise ModelError(
                f"{source}: it has no safetensors; name a GGUF file: hf://{hub.repo_id}/FILE.gguf"
            ) from error
    tensors = {
        name: StoredTensor(
            tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0]
        )
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return _of_config(source, config, tensors)


def _hub_part(hub: HubSource, name: str) -> GgufPart:
    cached = try_to_load_from_cache(hub.repo_id, name, revision=hub.revision)
    if isinstance(cached, str):
        return _local_part(Path(cached))
    url = hf_hub_url(hub.repo_id, name, revision=hub.revision)
    token = get_token()
    return _remote_part(RemoteFile(url, {"Authorization": f"Bearer {token}"} if token else {}))
