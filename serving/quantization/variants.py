"""Which files are made of a model, and what each is compared with."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import filelock

from serving.folders import make_private
from serving.hardware.memory import MIB, host_total_mib
from serving.models.gguf import Header, read_header
from serving.models.requantize import prepare, type_name
from serving.models.sources import ModelError, resolve
from serving.quantization.measuring import Measured, Ruler

# What savings are of, with the bytes of a weight of a matrix. Vectors stay in 32 bits.
BASELINES = {"F32": 4, "F16": 2}
_WHOLE_TYPES = frozenset({"F32", "F16", "BF16"})
# A file that is measured is read into memory that other programs use, too.
_MOST_OF_MEMORY = 0.8
# Room for the reference's probabilities, and so that the disk is not filled to its last byte.
_SPARE_DISK_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Variant:
    """A model in one type. ``path`` None: made to be measured only, or not at all.

    ``measured`` None: ``file_bytes`` is counted from the source's header, because of ``why_counted``.
    """

    type: str
    is_source: bool
    path: Path | None
    file_bytes: int
    measured: Measured | None
    why_counted: str | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Variants of one source: baselines, the source, then what was asked for.

    Qualities are against the ``reference``: the first of them that was measured.
    """

    source: str
    source_type: str
    variants: tuple[Variant, ...]

    @property
    def reference(self) -> Variant:
        """What the others' predictions are compared with."""
        return next(variant for variant in self.variants if variant.measured is not None)

    @property
    def source_is_quantized(self) -> bool:
        """Whether what the model was trained as is not at hand: then 32-bit weights are no better than the source."""
        return self.source_type not in _WHOLE_TYPES

    def of_type(self, name: str) -> Variant | None:
        """The variant of a type, if it is among them."""
        return next((variant for variant in self.variants if variant.type == name), None)


class Progress:
    """Hears what is being done. By itself it tells nobody."""

    def begin(self, type_name: str, what: str) -> None:
        """A variant is being made or measured."""

    def chunk(self, done: int, of: int) -> None:
        """So much of the text has been read."""


def compare(
    source: str, types: Sequence[str], cache_dir: Path, text_path: Path, progress: Progress
) -> Comparison:
    """Make the types that are missing in ``cache_dir``, and measure all, one after the other.

    Baselines are made and measured where there is room, and removed; of one for which there is none the size
    is counted. Raises :class:`ModelError`; however it ends, no file is left half made.
    """
    path = resolve(source)
    header = read_header(path)
    source_type = type_name(header.file_type) or "source"
    whole = (source_type,) if source_type in _WHOLE_TYPES else ()
    variants: list[Variant] = []
    with _workplace(cache_dir) as folder:
        work = _Work(
            path, header, cache_dir, folder, Ruler(text_path, folder / "logprobs"), progress
        )
        for name in dict.fromkeys(("F32", *whole, "F16", source_type, *types)):
            is_reference = all(variant.measured is None for variant in variants)
            if name == source_type:
                variants.append(work.measured(name, path, is_reference, is_source=True))
            elif name in types:
                variants.append(work.kept(name, is_reference))
            else:
                variants.append(work.baseline(name, is_reference))
    return Comparison(source, source_type, tuple(variants))


@dataclass(frozen=True, slots=True)
class _Work:
    """One comparison while it goes on. What is in ``folder`` goes with its end."""

    source: Path
    header: Header
    cache_dir: Path
    folder: Path
    ruler: Ruler
    progress: Progress

    def measured(
        self, name: str, path: Path, is_reference: bool, *, is_source: bool = False
    ) -> Variant:
        self.progress.begin(name, "measuring")
        measured = self.ruler.measure(path, is_reference=is_reference, on_chunk=self.progress.chunk)
        return Variant(name, is_source, path, path.stat().st_size, measured)

    def kept(self, name: str, is_reference: bool) -> Variant:
        self.progress.begin(name, "making")
        return self.measured(name, prepare(self.source, name, self.cache_dir), is_reference)

    def baseline(self, name: str, is_reference: bool) -> Variant:
        size_bytes = counted_bytes(self.header, name)
        why_counted = _no_room(size_bytes, self.folder)
        if why_counted is None:
            try:
                self.progress.begin(name, "making")
                path = prepare(self.source, name, self.folder)
                return replace(self.measured(name, path, is_reference), path=None)
            except ModelError as error:
                why_counted = str(error)
            finally:
                for path in self.folder.glob("*.gguf"):
                    path.unlink()
        return Variant(name, False, None, size_bytes, None, why_counted)


def counted_bytes(header: Header, name: str) -> int:
    """The size of a file of the source's tensors in a baseline's type, from its header."""
    weight_bytes = BASELINES[name]
    return header.data_offset_bytes + sum(
        math.prod(tensor.shape) * (weight_bytes if len(tensor.shape) > 1 else 4)
        for tensor in header.tensors.values()
    )


def _no_room(size_bytes: int, folder: Path) -> str | None:
    """Why a file of a size is not made here; None if it may be."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes + _SPARE_DISK_BYTES:
        return (
            f"it takes {size_bytes / 1e6:,.0f} MB, and {free_bytes / 1e6:,.0f} MB are free in "
            f"{folder.parent}"
        )
    memory_bytes = host_total_mib() * MIB
    if size_bytes > _MOST_OF_MEMORY * memory_bytes:
        return (
            f"it takes {size_bytes / 1e6:,.0f} MB, and this machine has "
            f"{memory_bytes / 1e6:,.0f} MB of memory"
        )
    return None


@contextmanager
def _workplace(cache_dir: Path) -> Iterator[Path]:
    """An empty folder for what nobody needs afterwards. One at a time: two would spoil each other's speeds."""
    folder = cache_dir / "measuring"
    try:
        make_private(cache_dir)
        with filelock.FileLock(cache_dir / ".measuring.lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except filelock.Timeout:
        raise ModelError(
            f"another `rigserve models quantize` works in {cache_dir}; wait for it"
        ) from None
    except OSError as error:
        raise ModelError(
            f"cannot work in {cache_dir}: {error.strerror or error}; see storage.cache_dir"
        ) from error
