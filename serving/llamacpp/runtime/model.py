"""A model's weights and vocabulary."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp

from serving.llamacpp.runtime.faults import RuntimeFault, fault, on_log, weight_buffers_bytes


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """The tokens around the text before a gap, the text after it, and the gap."""

    prefix: int
    suffix: int
    middle: int


class Model:
    """A GGUF model's weights and vocabulary."""

    def __init__(self, path: Path, gpu_layers: int) -> None:
        """Load the file; ``gpu_layers`` -1 puts all layers on the GPU. Raises :class:`RuntimeFault`."""
        llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        if gpu_layers == 0 or not llama_cpp.llama_supports_gpu_offload():
            # Read into memory of its own rather than mapped: in huge pages a processor finds the weights
            # sooner (docs/results/engine.md).
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        before = weight_buffers_bytes.copy()
        handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise fault(f"cannot load {path}")
        self.handle = handle
        # What llama.cpp took for the weights, by the kind of buffer (``CPU``, ``CUDA0``), as its log says.
        self.buffers_bytes = dict(weight_buffers_bytes - before)
        self._vocab = llama_cpp.llama_model_get_vocab(handle)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.context_length_trained: int = llama_cpp.llama_model_n_ctx_train(handle)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def close(self) -> None:
        """Free the weights."""
        llama_cpp.llama_model_free(self.handle)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors of the file together, scales included."""
        size_bytes: int = llama_cpp.llama_model_size(self.handle)
        return 8 * size_bytes / int(llama_cpp.llama_model_n_params(self.handle))

    @property
    def build(self) -> str:
        """The library and its version, for ``system_fingerprint``."""
        return f"llama-cpp-python {llama_cpp.__version__}"

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata (not an array) as text; None if it is not there."""
        buffer = ctypes.create_string_buffer(256)
        length = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", errors="replace") if length >= 0 else None

    @property
    def has_state(self) -> bool:
        """Whether it carries a state from token to token (Mamba, hybrids), which cannot be taken back."""
        return bool(
            llama_cpp.llama_model_is_recurrent(self.handle)
            or llama_cpp.llama_model_is_hybrid(self.handle)
        )

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
    def bos_tokens(self) -> list[int]:
        """What :meth:`tokenize` with ``add_special`` begins with."""
        return [llama_cpp.llama_vocab_bos(self._vocab)] if self.adds_bos else []

    @property
    def fill_in_the_middle_tokens(self) -> FillInTheMiddle | None:
        """The model's own, if it was trained to fill in the middle."""
        tokens = FillInTheMiddle(
            prefix=llama_cpp.llama_vocab_fim_pre(self._vocab),
            suffix=llama_cpp.llama_vocab_fim_suf(self._vocab),
            middle=llama_cpp.llama_vocab_fim_mid(self._vocab),
        )
        return None if min(tokens.prefix, tokens.suffix, tokens.middle) < 0 else tokens

    @property
    def bos_text(self) -> str:
        """Text of the beginning-of-sequence token; empty if the model has none."""
        return self.token_text(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        """Text of the end-of-sequence token; empty if the model has none."""
        return self.token_text(llama_cpp.llama_vocab_eos(self._vocab))

    def token_text(self, token: int) -> str:
        """A token as the vocabulary spells it, such as ``Ġsea``; empty for a negative one."""
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

    def token_of(self, text: str) -> int | None:
        """The one token that ``text`` stands for, control tokens included; None if it takes several."""
        tokens = self.tokenize(text, add_special=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    def piece(self, token: int, *, control: bool = False) -> bytes:
        """The bytes a token stands for; control tokens stand for nothing unless ``control`` shows them."""
        known = self._pieces.get((token, control))
        if known is None:
            known = self._pieces[token, control] = self._read_piece(token, control)
        return known

    def _read_piece(self, token: int, control: bool) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            length = llama_cpp.llama_token_to_piece(
                self._vocab, token, buffer, capacity, 0, control
            )
            if length >= 0:
                return buffer.raw[:length]
            capacity = -length

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that tokens stand for; control tokens are written out."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        capacity = 8 * len(tokens)
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            length = llama_cpp.llama_detokenize(
                self._vocab, array, len(tokens), buffer, capacity, False, True
            )
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", errors="replace")
            capacity = -length

    def ends_generation(self, token: int) -> bool:
        """Whether the model says with this token that it is done."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))
