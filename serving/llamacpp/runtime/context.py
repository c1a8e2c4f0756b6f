"""KV memory and compute."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from serving.llamacpp.runtime.faults import fault
from serving.llamacpp.runtime.model import Model


class Context:
    """KV memory and compute for ``slots`` sequences, each with its own stream of KV cells."""

    def __init__(
        self, model: Model, *, slots: int, context_length: int, batch_tokens: int, threads: int
    ) -> None:
        """Allocate ``slots`` x ``context_length`` KV cells; a batch holds at most ``batch_tokens`` rows.

        Raises :class:`RuntimeFault` when the memory is not there.
        """
        rows = max(batch_tokens, slots)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context_length * slots
        params.n_seq_max = slots
        params.n_batch = rows
        params.n_ubatch = rows
        params.n_threads = threads
        params.n_threads_batch = threads
        params.kv_unified = False
        params.no_perf = True
        handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise fault(f"no memory for {slots} sequences of {context_length} tokens")
        self.handle = handle
        self.slots = slots
        self.context_length = context_length
        self.batch_tokens = batch_tokens
        self._vocab_size = model.vocab_size
        self._memory = llama_cpp.llama_get_memory(handle)
        self._batch = _Batch(rows)

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
        status = llama_cpp.llama_decode(
            self.handle, self._batch.filled(tokens, positions, slots, outputs)
        )
        if status != 0:
            raise fault(f"llama_decode failed with status {status}")

    def logits(self, row: int) -> NDArray[np.float32]:
        """A copy of the raw logits of a row of the last batch: ``[vocab_size]``."""
        pointer = llama_cpp.llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()

    def truncate(self, slot: int, length: int) -> bool:
        """Forget the slot's cells from position ``length`` on.

        False when the model's memory cannot be cut there (recurrent state, sliding windows): then
        the slot has been emptied altogether.
        """
        if llama_cpp.llama_memory_seq_rm(self._memory, slot, length, -1):
            return True
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)
        return False


class _Batch:
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
