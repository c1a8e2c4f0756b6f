"""Images: a projector file turns their pixels into rows that stand where tokens' embeddings would."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cpp import mtmd_cpp
from numpy.typing import NDArray

from serving.llamacpp.runtime.faults import RuntimeFault, fault, on_log
from serving.llamacpp.runtime.model import Model
from serving.models.gguf import read_header

# Encoding an image takes longer than reading its tokens; a chat sends all its images again each turn.
_REMEMBERED_BYTES = 256 * 2**20


class UnfitPicture(RuntimeFault):
    """A picture that the projector cannot take."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded image: rows of pixels from the top, three bytes each (RGB)."""

    width: int
    height: int
    pixels: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """An image, or a tile of one, in a prompt: rows ``start`` to ``end`` of it.

    It takes ``positions`` positions, which may be fewer than rows. Unless it ``is_causal`` its rows see
    each other, and have to be decoded in one batch.
    """

    start: int
    embeddings: NDArray[np.float32]
    positions: int
    is_causal: bool
    _at_0: NDArray[np.int32]
    _slope: NDArray[np.int32]

    @property
    def end(self) -> int:
        """The first row after it."""
        return self.start + len(self.embeddings)

    @property
    def saved_positions(self) -> int:
        """By how many what follows lies before where its row number says."""
        return len(self.embeddings) - self.positions

    def positions_at(self, position: int) -> NDArray[np.int32]:
        """Each row's position when the first has this one, ``[dimensions, rows]``."""
        return self._at_0 + self._slope * np.int32(position)

    def rows(self, first: int, count: int, position: int) -> ImageRows:
        """Some of its rows, when the very first is at ``position``."""
        part = slice(first, first + count)
        return ImageRows(
            self.embeddings[part], self.positions_at(position)[:, part], self.is_causal
        )


@dataclass(frozen=True, slots=True, eq=False)
class ImageRows:
    """Rows of a batch that stand for an image: ``[rows, width]``, at ``positions[dimension, row]``."""

    embeddings: NDArray[np.float32]
    positions: NDArray[np.int32]
    is_causal: bool


class Projector:
    """A projector file (mmproj) beside the model it was trained with. One thread at a time uses it."""

    def __init__(self, model: Model, path: Path, *, threads: int, use_gpu: bool) -> None:
        """Load the file; raises :class:`RuntimeFault` if it is broken or belongs to another model."""
        mtmd_cpp.mtmd_helper_log_set(on_log, ctypes.c_void_p(0))
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = use_gpu
        params.n_threads = threads
        params.print_timings = False
        handle = mtmd_cpp.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not handle:
            raise fault(f"cannot load the projector {path}")
        if _data_end(path) > path.stat().st_size:  # libmtmd does not look
            mtmd_cpp.mtmd_free(handle)
            raise RuntimeFault(f"the projector {path} ends early; fetch it again")
        self._handle = handle
        self._model = model
        self._width: int = llama_cpp.llama_model_n_embd_inp(model.handle)
        self._dimensions = 4 if mtmd_cpp.mtmd_decode_use_mrope(handle) else 1
        self._remembered: OrderedDict[tuple[bytes, int], NDArray[np.float32]] = OrderedDict()
        self._remembered_bytes = 0
        if not mtmd_cpp.mtmd_support_vision(handle):
            self.close()
            raise RuntimeFault(f"the projector {path} reads no images")
        try:
            self.read([Picture(64, 64, bytes(64 * 64 * 3))], lambda _: None)
        except RuntimeFault:
            self.close()
            raise

    def close(self) -> None:
        """Free the weights, before the model's."""
        mtmd_cpp.mtmd_free(self._handle)

    def read(
        self, parts: Sequence[str | Picture], check_length: Callable[[int], None]
    ) -> tuple[list[int], list[Image]]:
        """A prompt of texts (with control tokens) and pictures, as tokens, and where the images lie.

        ``check_length`` may raise for a number of tokens, before pictures are encoded. An image's rows hold one negative number each, the same for the same image and no other. Raises
        :class:`UnfitPicture` for pictures that cannot be cut into tiles, and :class:`RuntimeFault`.
        """
        tokens: list[int] = []
        images: list[Image] = []
        seen: Counter[bytes] = Counter()
        with self._chunks(parts) as chunks:
            check_length(mtmd_cpp.mtmd_helper_get_n_tokens(chunks))
            for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
                chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
                if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == (
                    mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT
                ):
                    tokens += self._text_tokens(chunk)
                    continue
                digest: bytes = mtmd_cpp.mtmd_input_chunk_get_id(chunk)
                image = self._image(chunk, (digest, seen[digest]), len(tokens))
                tokens += [_number_of(digest, seen[digest], image)] * len(image.embeddings)
                images.append(image)
                seen[digest] += 1
        return tokens, images

    @contextmanager
    def _chunks(self, parts: Sequence[str | Picture]) -> Iterator[mtmd_cpp.mtmd_input_chunks_p]:
        pointers = (ctypes.POINTER(mtmd_cpp.mtmd_input_part) * len(parts))()
        alive: list[object] = []
        bitmaps: list[mtmd_cpp.mtmd_bitmap_p] = []
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            for number, part in enumerate(parts):
                if isinstance(part, str):
                    data = part.encode()
                    text = mtmd_cpp.mtmd_input_text(data, len(data), False, True)
                    item = mtmd_cpp.mtmd_input_part(text=ctypes.pointer(text))
                else:
                    bitmaps.append(_bitmap(part))
                    item = mtmd_cpp.mtmd_input_part(bitmap=bitmaps[-1])
                alive.append(item)
                pointers[number] = ctypes.pointer(item)
            status = mtmd_cpp.mtmd_tokenize_from_parts(
                self._handle, chunks, pointers, len(parts), True
            )
            if status != 0:
                raise UnfitPicture(str(fault(f"cannot prepare the image (status {status})")))
            yield chunks
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                mtmd_cpp.mtmd_bitmap_free(bitmap)

    def _text_tokens(self, chunk: mtmd_cpp.mtmd_input_chunk_p) -> list[int]:
        count = ctypes.c_size_t()
        pointer = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
        tokens: list[int] = pointer[: count.value]
        if min(tokens, default=0) < 0:
            raise RuntimeFault(
                "the model's vocabulary lacks tokens that its projector puts around images: "
                "the two files do not belong together"
            )
        return tokens

    def _image(
        self, chunk: mtmd_cpp.mtmd_input_chunk_p, key: tuple[bytes, int], start: int
    ) -> Image:
        rows = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
        at_0 = self._positions(chunk, rows, 0)
        return Image(
            start=start,
            embeddings=self._embeddings(chunk, key, rows),
            positions=mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk),
            is_causal=not mtmd_cpp.mtmd_decode_use_non_causal(self._handle, chunk),
            _at_0=at_0,
            _slope=self._positions(chunk, rows, 1) - at_0,
        )

    def _positions(
        self, chunk: mtmd_cpp.mtmd_input_chunk_p, rows: int, position: int
    ) -> NDArray[np.int32]:
        table = (mtmd_cpp.mtmd_decoder_pos * rows)()
        tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_image(chunk)
        mtmd_cpp.mtmd_helper_image_get_decoder_pos(tokens, position, table)
        # llama.cpp wants time, y, x and a fourth.
        columns = np.frombuffer(memoryview(table).cast("B"), np.int32).reshape(rows, 4)
        columns = columns[:, [0, 2, 1, 3]]
        return np.ascontiguousarray(columns.T[: self._dimensions])

    def _embeddings(
        self, chunk: mtmd_cpp.mtmd_input_chunk_p, key: tuple[bytes, int], rows: int
    ) -> NDArray[np.float32]:
        """The chunk encoded, or remembered from the last time."""
        known = self._remembered.get(key)
        if known is not None and len(known) == rows:
            self._remembered.move_to_end(key)
            return known
        if mtmd_cpp.mtmd_encode_chunk(self._handle, chunk) != 0:
            raise fault("cannot encode the image")
        output = mtmd_cpp.mtmd_get_output_embd(self._handle)
        encoded = np.ctypeslib.as_array(output, (rows, self._width)).copy()
        self._remembered[key] = encoded
        self._remembered_bytes += encoded.nbytes - (0 if known is None else known.nbytes)
        while self._remembered_bytes > _REMEMBERED_BYTES:
            self._remembered_bytes -= self._remembered.popitem(last=False)[1].nbytes
        return encoded


def _data_end(path: Path) -> int:
    """Where the last tensor of a GGUF file that llama.cpp could read ends."""
    header = read_header(path)
    row_size = llama_cpp.llama_cpp._lib.ggml_row_size
    row_size.argtypes, row_size.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_size_t
    last: int = max(
        tensor.offset_bytes + row_size(tensor.type, math.prod(tensor.shape))
        for tensor in header.tensors.values()
    )
    return header.data_offset_bytes + last


def _bitmap(picture: Picture) -> mtmd_cpp.mtmd_bitmap_p:
    pixels = (ctypes.c_uint8 * len(picture.pixels)).from_buffer_copy(picture.pixels)
    bitmap: mtmd_cpp.mtmd_bitmap_p = mtmd_cpp.mtmd_bitmap_init(
        picture.width, picture.height, pixels
    )
    size = f"{picture.width}x{picture.height} ".encode()
    digest = hashlib.sha256(size + picture.pixels).hexdigest()
    mtmd_cpp.mtmd_bitmap_set_id(bitmap, digest.encode())
    return bitmap


def _number_of(digest: bytes, tile: int, image: Image) -> int:
    """What stands for an image in a list of tokens: a digest of all its cells depend on, below zero."""
    content = hashlib.sha256(b"%b %d " % (digest, tile))
    content.update(image.positions_at(0).tobytes())
    content.update(image.positions_at(1).tobytes())
    return -1 - int.from_bytes(content.digest())
