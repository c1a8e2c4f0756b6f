"""KV memory and compute."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import compress, count
from typing import Any, Literal

import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from serving.llamacpp.runtime.adapters import LoraAdapter, use_adapter
from serving.llamacpp.runtime.faults import RuntimeFault, fault
from serving.llamacpp.runtime.model import Model
from serving.llamacpp.runtime.multimodal import ImageRows

_MAX_CELLS = 2**32
KvType = Literal["F16", "BF16", "Q8_0", "Q4_0"]


class Context:
    """KV memory and compute for ``slots`` sequences.

    Unless ``kv_tokens`` is given every slot has a stream of ``context_length`` cells of its own, which
    decodes fastest. With it all slots share a pool of that many cells: less memory for the same slots.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        context_length: int,
        batch_tokens: int,
        threads: int,
        kv_tokens: int | None = None,
        kv_type: KvType = "F16",
        flash_attention: bool = True,
    ) -> None:
        """Allocate the cells; a batch holds at most ``batch_tokens`` rows (or one for each slot).

        With ``flash_attention`` llama.cpp takes that kernel where it has it for the device.
        Raises :class:`RuntimeFault` when the memory is not there, or the model's heads do not suit ``kv_type``.
        """
        cells = kv_tokens or context_length * slots
        if cells >= _MAX_CELLS:
            raise RuntimeFault(
                f"{slots} slots of {context_length} tokens are more than llama.cpp counts"
            )
        rows = max(batch_tokens, slots)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = cells
        params.n_seq_max = slots
        params.n_batch = rows
        params.n_ubatch = rows
        params.n_threads = threads
        params.n_threads_batch = threads
        params.kv_unified = kv_tokens is not None
        params.type_k = params.type_v = int(GGMLQuantizationType[kv_type])
        if not flash_attention:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise fault(f"no memory for {params.n_ctx} tokens of KV cache ({slots} slots)")
        self.handle = handle
        self.slots = slots
        self.context_length = context_length
        self.kv_tokens = cells
        self.is_pool = kv_tokens is not None
        self.batch_tokens = rows
        self._vocab_size = model.vocab_size
        self._memory = llama_cpp.llama_get_memory(handle)
        self._batch = Batch(rows)
        self._adapter: LoraAdapter | None = None
        self._output_of: dict[int, int] = {}
        self._logits: NDArray[np.float32]
        self._views: dict[tuple[int, int], NDArray[np.float32]] = {}

    def close(self) -> None:
        """Free the KV memory."""
        llama_cpp.llama_free(self.handle)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        outputs: Sequence[bool],
    ) -> None:
        """Run one batch; row ``i`` is ``tokens[i]`` at ``positions[i]`` of sequence ``slots[i]``.

        Afterwards the logits of every row with ``outputs[i]`` can be sampled or read, until the next
        call. Raises :class:`RuntimeFault`; the KV cells of the batch's sequences are then undefined.
        """
        self._decode(self._batch.filled(tokens, positions, slots, outputs), outputs)

    def use_adapter(self, adapter: LoraAdapter | None) -> None:
        """Apply an adapter, or none, to every row of the batches that follow."""
        if adapter is not self._adapter:
            use_adapter(self.handle, adapter)
            self._adapter = adapter

    def decode_images(
        self, images: Sequence[ImageRows], slots: Sequence[int], outputs: Sequence[bool]
    ) -> None:
        """As :meth:`decode`, of images' rows in place of tokens.

        One that is not causal goes alone: its rows see those after them, too.
        """
        embeddings = np.concatenate([image.embeddings for image in images])
        positions = np.concatenate([image.positions for image in images], axis=1)
        batch = self._batch.filled([0] * len(slots), positions[0], slots, outputs)
        images_batch = llama_cpp.llama_batch(
            n_tokens=len(slots),
            token=None,
            embd=embeddings.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=batch.n_seq_id,
            seq_id=batch.seq_id,
            logits=batch.logits,
        )
        llama_cpp.llama_set_causal_attn(self.handle, images[0].is_causal)
        try:
            self._decode(images_batch, outputs)
        finally:
            llama_cpp.llama_set_causal_attn(self.handle, True)

    def _decode(self, batch: llama_cpp.llama_batch, outputs: Sequence[bool]) -> None:
        status = llama_cpp.llama_decode(self.handle, batch)
        if status != 0:
            raise fault(f"llama_decode failed with status {status}")
        # Waits for the GPU, and sorts the output rows: afterwards threads may read them side by side.
        llama_cpp.llama_synchronize(self.handle)
        self._output_of = {row: at for at, row in enumerate(compress(count(), outputs))}
        if self._output_of:
            self._logits = self._view(llama_cpp.llama_get_logits(self.handle))

    def _view(self, pointer: Any) -> NDArray[np.float32]:
        """The output rows as an array; llama.cpp keeps them in one place, and a view takes long to make."""
        key = ctypes.addressof(pointer.contents), len(self._output_of)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = np.ctypeslib.as_array(pointer, (key[1], self._vocab_size))
        return view

    def logits(self, row: int) -> NDArray[np.float32]:
        """The raw logits of a row of the last batch, ``[vocab_size]``: llama.cpp's own memory.

        What is written there is what samplers see. It is overwritten by the next :meth:`decode`.
        """
        row_logits: NDArray[np.float32] = self._logits[self._output_of[row]]
        return row_logits

    def truncate(self, slot: int, length: int) -> bool:
        """Forget the slot's cells from position ``length`` on.

        False when the model's memory cannot be cut there (recurrent state, sliding windows): then
        the slot has been emptied altogether.
        """
        if llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1):
            return True
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False

    def copy(self, source: int, target: int) -> None:
        """Give ``target`` the cells of ``source``, in place of its own.

        Streams are copied by the next :meth:`decode`: until then ``source`` may grow shorter, but
        neither slot may be restored. In a pool the cells are shared and nothing is copied.
        """
        llama_cpp.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def saved_bytes(self, slot: int) -> int:
        """What :meth:`save` would return takes."""
        return int(llama_cpp.llama_state_seq_get_size(self.handle, slot))

    def save(self, slot: int) -> NDArray[np.uint8] | None:
        """The slot's cells as bytes for :meth:`restore`; None if llama.cpp cannot tell them."""
        size = self.saved_bytes(slot)
        data = np.empty(size, np.uint8)
        written = llama_cpp.llama_state_seq_get_data(self.handle, _bytes_of(data), size, slot)
        return data if written == size else None

    def restore(self, slot: int, data: NDArray[np.uint8]) -> bool:
        """Fill an empty slot with saved cells; False (and still empty) if there is no room for them."""
        read = llama_cpp.llama_state_seq_set_data(self.handle, _bytes_of(data), len(data), slot)
        if read != len(data):
            llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
            return False
        return True


def _bytes_of(data: NDArray[np.uint8]) -> object:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


class Batch:
    """A ``llama_batch`` over NumPy arrays that live as long as it does."""

    def __init__(self, rows: int) -> None:
        self._tokens = np.zeros(rows, np.int32)
        self._positions = np.zeros(rows, np.int32)
        self._slots = np.zeros(rows, np.int32)
        self._outputs = np.zeros(rows, np.int8)
        self._one_slot_each = np.ones(rows, np.int32)
        int32 = ctypes.POINTER(ctypes.c_int32)
        first = self._slots.ctypes.data
        self._slot_pointers = (int32 * rows)(
            *(ctypes.cast(first + 4 * row, int32) for row in range(rows))
        )
        self._batch = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(int32),
            embd=None,
            pos=self._positions.ctypes.data_as(int32),
            n_seq_id=self._one_slot_each.ctypes.data_as(int32),
            seq_id=ctypes.cast(self._slot_pointers, ctypes.POINTER(int32)),
            logits=self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def filled(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        outputs: Sequence[bool],
    ) -> llama_cpp.llama_batch:
        rows = len(tokens)
        self._tokens[:rows] = tokens
        self._positions[:rows] = positions
        self._slots[:rows] = slots
        self._outputs[:rows] = outputs
        self._batch.n_tokens = rows
        return self._batch
