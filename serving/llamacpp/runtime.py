"""llama.cpp, as the rest of the engine sees it. The only file of the engine that touches ctypes.

Nothing here is thread-safe except the vocabulary (:meth:`Model.tokenize`, :meth:`Model.piece`); the
scheduler's thread owns the context and the samplers.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from serving.llamacpp.sampling import SamplingParams

_log = logging.getLogger("llama.cpp")
_ERROR_LEVEL, _WARNING_LEVEL, _CONTINUED_LEVEL = 4, 3, 5
_recent_errors: list[str] = []


class RuntimeFault(Exception):
    """llama.cpp refused or failed; the message holds its own last words."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", errors="replace").strip()
    if not line or level == _CONTINUED_LEVEL:
        return
    if level >= _ERROR_LEVEL:
        _recent_errors.append(line)
        del _recent_errors[:-5]
        _log.error("%s", line)
    elif level == _WARNING_LEVEL:
        _log.debug("%s", line)


def _fault(what: str) -> RuntimeFault:
    details = "; ".join(_recent_errors) or "llama.cpp gave no reason"
    return RuntimeFault(f"{what}: {details}")


class Model:
    """A GGUF model's weights and vocabulary."""

    def __init__(self, path: Path, gpu_layers: int) -> None:
        """Load the file; ``gpu_layers`` -1 puts all layers on the GPU. Raises :class:`RuntimeFault`."""
        llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise _fault(f"cannot load {path}")
        self.handle = handle
        self._vocab = llama_cpp.llama_model_get_vocab(handle)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.context_length_trained: int = llama_cpp.llama_model_n_ctx_train(handle)
        self._pieces: dict[int, bytes] = {}

    def close(self) -> None:
        """Free the weights."""
        llama_cpp.llama_model_free(self.handle)

    @property
    def build(self) -> str:
        """The library and its version, for ``system_fingerprint``."""
        return f"llama-cpp-python {llama_cpp.__version__}"

    @property
    def chat_template(self) -> str | None:
        """The Jinja template stored in the file, if there is one."""
        template = llama_cpp.llama_model_chat_template(self.handle, None)
        return template.decode("utf-8") if template else None

    @property
    def adds_bos(self) -> bool:
        """Whether :meth:`tokenize` with ``add_special`` begins with the BOS token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos_text(self) -> str:
        """Text of the beginning-of-sequence token; empty if the model has none."""
        return self._token_text(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        """Text of the end-of-sequence token; empty if the model has none."""
        return self._token_text(llama_cpp.llama_vocab_eos(self._vocab))

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", errors="replace")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``.

        ``add_special`` adds what the model wants at the beginning (BOS); ``parse_special`` reads
        control tokens written as text (as chat templates do) as such.
        """
        data = text.encode("utf-8")
        capacity = len(data) + 8
        tokens = (llama_cpp.llama_token * capacity)()
        count = llama_cpp.llama_tokenize(
            self._vocab, data, len(data), tokens, capacity, add_special, parse_special
        )
        if count < 0:
            raise RuntimeFault(f"cannot tokenize a text of {len(data)} bytes")
        return tokens[:count]

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; control tokens stand for nothing."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._read_piece(token)
        return known

    def _read_piece(self, token: int) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            length = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, capacity, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            capacity = -length

    def ends_generation(self, token: int) -> bool:
        """Whether the model says with this token that it is done."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))


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
            raise _fault(f"no memory for {slots} sequences of {context_length} tokens")
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
            raise _fault(f"llama_decode failed with status {status}")

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


class Sampler:
    """One sequence's chain of samplers, in C. It remembers the tokens it chose (for penalties)."""

    def __init__(self, model: Model, params: SamplingParams, context_length: int) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(
            llama_cpp.llama_sampler_chain_default_params()
        )
        if params.logit_bias:
            biases = (llama_cpp.llama_logit_bias * len(params.logit_bias))(
                *(llama_cpp.llama_logit_bias(token, bias) for token, bias in params.logit_bias)
            )
            self._add(
                llama_cpp.llama_sampler_init_logit_bias(
                    model.vocab_size, len(params.logit_bias), biases
                )
            )
        if params.frequency_penalty or params.presence_penalty:
            self._add(
                llama_cpp.llama_sampler_init_penalties(
                    model.vocab_size,
                    context_length,
                    1.0,
                    params.frequency_penalty,
                    params.presence_penalty,
                )
            )
        if params.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        # Temperature first, as in Transformers and vLLM: top_p then cuts the distribution sampled from.
        if params.temperature != 1:
            self._add(llama_cpp.llama_sampler_init_temp(params.temperature))
        if params.top_k:
            self._add(llama_cpp.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(params.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_dist(params.seed))

    def _add(self, sampler: llama_cpp.llama_sampler_p) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, row: int) -> int:
        """Choose and remember the token that follows a row of the context's last batch."""
        return int(llama_cpp.llama_sampler_sample(self._chain, context.handle, row))

    def close(self) -> None:
        """Free the chain. It must not be used afterwards."""
        llama_cpp.llama_sampler_free(self._chain)
