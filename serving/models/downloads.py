"""Models of the Hugging Face Hub on this machine: what there is to fetch, fetching it, checking and removing it.

They are kept in the Hub library's own cache, which other programs share. Its files are named by their checksums.
"""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, DryRunError

from serving.models.hub import HubSource, ModelError, check_reachable, hub_errors
from serving.models.split import split_names

# Of a repository of safetensors, what engines read.
_FOLDER_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_LEFT_OUT = ("original/*", "onnx/*", "openvino/*", "metal/*")
_KEPT_FREE_BYTES = 2**30
_BLOCK_BYTES = 2**22
_PARALLEL = 8
_WATCH_SECONDS = 0.2
_SHA1_LENGTH, _SHA256_LENGTH = 40, 64
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository, and whether it is here already."""

    name: str
    size_bytes: int
    is_here: bool


@dataclass(frozen=True, slots=True)
class Fetch:
    """What a download would bring."""

    hub: HubSource
    files: tuple[HubFile, ...]

    @property
    def total_bytes(self) -> int:
        """All of it, on the disk in the end."""
        return sum(file.size_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What is not here yet, in files that are not complete."""
        return sum(file.size_bytes for file in self.files if not file.is_here)


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file that was downloaded. ``blob`` is where it lies; revisions, and other names, may share one."""

    repo_id: str
    name: str
    path: Path
    blob: Path
    size_bytes: int
    fetched_at_unix: float

    @property
    def source(self) -> str:
        """As in a config."""
        return str(HubSource(self.repo_id, self.name))


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository that a search found."""

    repo_id: str
    downloads: int
    likes: int
    is_gated: bool


def search_hub(words: str, *, gguf_only: bool, limit: int) -> list[HubModel]:
    """Repositories whose names have the words, the most downloaded first; raises :class:`ModelError`."""
    check_reachable(f"search for {words!r}")
    with hub_errors(f"search for {words!r}"):
        found = HfApi().list_models(
            search=words,
            filter="gguf" if gguf_only else None,
            sort="downloads",
            limit=limit,
            expand=["downloads", "likes", "gated"],
        )
        return [
            HubModel(each.id, each.downloads or 0, each.likes or 0, bool(each.gated))
            for each in found
        ]


def look_up(source: str, include: Sequence[str] = ()) -> Fetch:
    """What ``hf://ORG/REPO/FILE.gguf`` or ``hf://ORG/REPO`` would bring; raises :class:`ModelError`.

    Of a split file all parts; of a repository what engines read of its safetensors, or what ``include``
    has patterns for.
    """
    hub = HubSource.parse(source)
    if hub.file is not None:
        wanted = [glob.escape(name) for name in split_names(hub.file)]
        files = _ask(source, hub, wanted)
        if not files:
            raise ModelError(f"{source}: {hub.repo_id} holds no file {hub.file}")
        return Fetch(hub, files)
    if include:
        files = _ask(source, hub, include)
        if not files:
            raise ModelError(f"{source}: it has no files like {' or '.join(include)}")
        return Fetch(hub, files)
    files = _ask(source, hub, (*_FOLDER_FILES, "*.gguf"))
    choices = [file for file in files if file.name.endswith(".gguf")]
    if choices:
        raise ModelError(f"{source}: choose a file of it:\n{_listed(hub, choices)}")
    return Fetch(hub, files)


def _ask(source: str, hub: HubSource, wanted: Sequence[str]) -> tuple[HubFile, ...]:
    with hub_errors(source):
        try:
            infos = snapshot_download(
                hub.repo_id,
                revision=hub.revision,
                allow_patterns=list(wanted),
                ignore_patterns=list(_LEFT_OUT),
                dry_run=True,
            )
        except DryRunError as error:
            raise error.__cause__ or error from None
    # They come in the order in which the server answered.
    return tuple(
        HubFile(info.filename, info.file_size or 0, is_here=not info.will_download)
        for info in sorted(infos, key=lambda info: info.filename)
    )


def _listed(hub: HubSource, choices: Sequence[HubFile]) -> str:
    return "\n".join(
        f"  {replace(hub, file=file.name)}  ({file.size_bytes / 1e9:.1f} GB)"
        for file in sorted(choices, key=lambda file: file.size_bytes)
    )


def check_disk(fetch: Fetch, free_bytes: int | None = None) -> None:
    """Raises :class:`ModelError` unless there is room for a download, and a GiB beside it."""
    cache = Path(constants.HF_HUB_CACHE)
    if free_bytes is None:
        there = next(folder for folder in (cache, *cache.parents) if folder.exists())
        free_bytes = shutil.disk_usage(there).free
    needed_bytes = max(0, fetch.missing_bytes - _begun_bytes(fetch.hub)) + _KEPT_FREE_BYTES
    if fetch.missing_bytes and free_bytes < needed_bytes:
        raise ModelError(
            f"{fetch.hub}: it needs {needed_bytes / 1e9:.1f} GB, 1.1 GB of them to spare, but "
            f"{cache} has {free_bytes / 1e9:.1f} GB free; remove others "
            "(rigserve models list, remove), or set HF_HOME to a folder on another disk"
        )


def _begun_bytes(hub: HubSource) -> int:
    """What downloads that broke off have left: they are taken up again."""
    return sum(file.stat().st_blocks * 512 for file in _blobs(hub).glob("*.incomplete"))


def _blobs(hub: HubSource) -> Path:
    folder = f"models--{hub.repo_id.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / folder / "blobs"


def fetch_files(fetch: Fetch, on_bytes: Callable[[int], None] | None = None) -> list[CachedFile]:
    """Download what is missing, several files at once, and check all of it; raises :class:`ModelError`.

    What an earlier try has left is taken up. Files whose checksums are wrong are removed. ``on_bytes`` is
    told now and then, by another thread, how many of the missing bytes are here.
    """
    names = [glob.escape(file.name) for file in fetch.files]
    with hub_errors(str(fetch.hub)), _watched(fetch, on_bytes or (lambda _bytes: None)):
        folder = Path(
            snapshot_download(
                fetch.hub.repo_id,
                revision=fetch.hub.revision,
                allow_patterns=names,
                max_workers=_PARALLEL,
            )
        )
    fetched = {file.name for file in fetch.files if not file.is_here}
    files = [_cached(fetch.hub.repo_id, folder, folder / file.name) for file in fetch.files]
    for file in files:
        if file.name in fetched and is_intact(file) is False:
            remove_files([file])
            raise ModelError(
                f"{file.source}: it was damaged on its way, and is removed; pull it again"
            )
    return files


@contextmanager
def _watched(fetch: Fetch, on_bytes: Callable[[int], None]) -> Iterator[None]:
    """Tells how far a download is, by what lies on the disk: the library's own bars are made for notebooks."""
    blobs = _blobs(fetch.hub)
    there_before = {file for file in blobs.glob("*") if file.suffix != ".incomplete"}
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_WATCH_SECONDS):
            on_bytes(sum(_size(file) for file in set(blobs.glob("*")) - there_before))

    watcher = threading.Thread(target=watch, name="download", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
    on_bytes(fetch.missing_bytes)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # it has got its final name meanwhile
        return 0


def _cached(repo_id: str, folder: Path, path: Path) -> CachedFile:
    status = path.stat()
    return CachedFile(
        repo_id=repo_id,
        name=path.relative_to(folder).as_posix(),
        path=path,
        blob=path.resolve(),
        size_bytes=status.st_size,
        fetched_at_unix=status.st_mtime,
    )


def cached_files() -> list[CachedFile]:
    """All that was downloaded of models, in order; of several revisions of a file each that differs."""
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    found = {
        (repo.repo_id, file.blob_path): _cached(
            repo.repo_id, revision.snapshot_path, file.file_path
        )
        for repo in cache.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
        for file in revision.files
    }
    return sorted(found.values(), key=lambda file: (file.repo_id, file.name))


def chosen(files: Sequence[CachedFile], source: str) -> list[CachedFile]:
    """Those that ``ORG/REPO``, ``hf://ORG/REPO`` or ``hf://ORG/REPO/FILE`` names; raises :class:`ModelError`."""
    hub = HubSource.parse(source if HubSource.is_one(source) else f"hf://{source}")
    of_repository = [file for file in files if file.repo_id == hub.repo_id]
    names = None if hub.file is None else split_names(hub.file)
    wanted = [file for file in of_repository if names is None or file.name in names]
    if not wanted:
        held = ", ".join(sorted({file.repo_id for file in files})) or "nothing"
        raise ModelError(f"{source} is not on this machine; it has {held}")
    return wanted


def is_intact(file: CachedFile, on_bytes: Callable[[int], None] | None = None) -> bool | None:
    """Whether a file has the checksum that the Hub gave; None if that is not known here any more."""
    name = file.blob.name
    if not _HEX.fullmatch(name) or len(name) not in (_SHA1_LENGTH, _SHA256_LENGTH):
        return None
    if len(name) == _SHA256_LENGTH:
        digest = hashlib.sha256()
    else:  # small files have git's
        digest = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    for block in _blocks(file.blob):
        digest.update(block)
        if on_bytes is not None:
            on_bytes(len(block))
    return digest.hexdigest() == name


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            yield block


def remove_files(files: Sequence[CachedFile]) -> int:
    """Remove files, and every name that they have; returns the bytes that this frees."""
    freed_bytes = 0
    for file in files:
        repository = file.blob.parent.parent
        for name in (repository / "snapshots").rglob("*"):
            if name.is_symlink() and name.resolve() == file.blob:
                name.unlink()
        if file.blob.exists():
            freed_bytes += file.blob.stat().st_size
            file.blob.unlink()
        if not any(repository.glob("blobs/*")):
            shutil.rmtree(repository)
    return freed_bytes
