"""Embedding models and rerankers: one vector, or one row of scores, for each sequence of a batch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from enum import Enum

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from serving.llamacpp.runtime.context import Batch
from serving.llamacpp.runtime.faults import RuntimeFault, fault
from serving.llamacpp.runtime.model import Model


class Pooling(Enum):
    """How the vectors of a sequence's tokens become one: llama.cpp's ``enum llama_pooling_type``.

    ``RANK`` is a reranker: a classifier of the pair of texts in the sequence.
    """

    MEAN = llama_cpp.LLAMA_POOLING_TYPE_MEAN
    CLS = llama_cpp.LLAMA_POOLING_TYPE_CLS
    LAST = llama_cpp.LLAMA_POOLING_TYPE_LAST
    RANK = llama_cpp.LLAMA_POOLING_TYPE_RANK


def pooling_of(model: Model) -> Pooling | None:
    """What the model's file says of pooling; None if it is a generating model.

    Raises :class:`RuntimeFault` for a model that can neither generate nor be pooled.
    """
    architecture = model.metadata("general.architecture")
    key = f"{architecture}.pooling_type"
    named = model.metadata(key) or "0"
    if named in {str(pooling.value) for pooling in Pooling}:
        return Pooling(int(named))
    if named == "0" and model.metadata(f"{architecture}.attention.causal") != "false":
        return None
    raise RuntimeFault(
        f"this model cannot generate text, and its file has no usable {key} ({named}) that says how "
        "to embed with it; convert it again together with its pooling configuration"
    )


class PairFormat:
    """How a reranker reads a query and a document: as its file's template says, or side by side."""

    def __init__(self, model: Model) -> None:
        self._model = model
        template = llama_cpp.llama_model_chat_template(model.handle, b"rerank")
        self._template = template.decode("utf-8") if template else None
        vocab = llama_cpp.llama_model_get_vocab(model.handle)
        separates = llama_cpp.llama_vocab_get_add_eos(vocab) and llama_cpp.llama_vocab_get_add_sep(
            vocab
        )
        # RoBERTa's kind has two tokens between the texts, BERT's the one that ends the first.
        self._between = [llama_cpp.llama_vocab_sep(vocab)] if separates else []

    def tokens(self, query: str, document: str) -> list[int]:
        """Token ids of the pair."""
        if self._template is not None:
            texts = {"{query}": query, "{document}": document}
            prompt = re.sub(r"\{query\}|\{document\}", lambda name: texts[name[0]], self._template)
            return self._model.tokenize(prompt, add_special=False, parse_special=True)
        first, second = (
            self._model.tokenize(text, add_special=True, parse_special=False)
            for text in (query, document)
        )
        return first + self._between + second[1 if self._model.adds_bos else 0 :]


class EmbeddingContext:
    """Compute for batches of sequences that are each read once and pooled."""

    def __init__(
        self,
        model: Model,
        pooling: Pooling,
        *,
        context_length: int,
        batch_tokens: int,
        threads: int,
    ) -> None:
        """Room for batches of ``batch_tokens`` rows, or of one sequence of ``context_length``.

        Raises :class:`RuntimeFault` when the memory is not there.
        """
        is_rank = pooling is Pooling.RANK
        self.width: int = (
            llama_cpp.llama_model_n_cls_out(model.handle)
            if is_rank
            else llama_cpp.llama_model_n_embd_out(model.handle)
        )
        self.batch_tokens = batch_tokens
        self.max_sequences = min(batch_tokens, llama_cpp.llama_max_parallel_sequences())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(batch_tokens, context_length)
        params.n_seq_max = self.max_sequences
        params.n_threads = threads
        params.n_threads_batch = threads
        params.embeddings = True
        params.pooling_type = pooling.value
        params.kv_unified = True
        params.no_perf = True
        # Where only the last token counts and none sees a later one, long sequences go in pieces.
        self._rows = batch_tokens if is_rank or pooling is Pooling.LAST else params.n_ctx
        self._handle = _open(model, params, self._rows)
        if self._rows < params.n_ctx and not llama_cpp.llama_get_causal_attn(self._handle):
            self.close()
            self._rows = params.n_ctx
            self._handle = _open(model, params, self._rows)
        self._memory = llama_cpp.llama_get_memory(self._handle)
        self._batch = Batch(self._rows)

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_free(self._handle)

    def compute(self, inputs: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Each input's pooled vector as the model computes it, or a reranker's scores of it.

        Several inputs have ``batch_tokens`` tokens in all at most, and are ``max_sequences`` at most.
        Raises :class:`RuntimeFault`.
        """
        tokens = list(itertools.chain.from_iterable(inputs))
        positions = [position for tokens_ in inputs for position in range(len(tokens_))]
        sequences = [number for number, tokens_ in enumerate(inputs) for _ in tokens_]
        try:
            for start in range(0, len(tokens), self._rows):
                part = slice(start, start + self._rows)
                self._decode(tokens[part], positions[part], sequences[part])
            return [self._read(number) for number in range(len(inputs))]
        finally:
            llama_cpp.llama_memory_clear(self._memory, False)

    def _decode(self, tokens: list[int], positions: list[int], sequences: list[int]) -> None:
        # Pooling needs every row marked as an output.
        batch = self._batch.filled(tokens, positions, sequences, [True] * len(tokens))
        status = llama_cpp.llama_decode(self._handle, batch)
        if status != 0:
            raise fault(f"llama_decode failed with status {status}")

    def _read(self, sequence: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_embeddings_seq(self._handle, sequence)
        if not pointer:
            raise fault("llama.cpp returned no embedding")
        return np.ctypeslib.as_array(pointer, (self.width,)).copy()


def _open(
    model: Model, params: llama_cpp.llama_context_params, rows: int
) -> llama_cpp.llama_context_p:
    params.n_batch = params.n_ubatch = rows
    handle: llama_cpp.llama_context_p = llama_cpp.llama_init_from_model(model.handle, params)
    if not handle:
        raise fault(f"no memory for batches of {rows} tokens")
    return handle
