"""A model's weights and vocabulary."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp

from serving.llamacpp.runtime.faults import RuntimeFault, fault, on_log


class Model:
    """A GGUF model's weights and vocabulary."""

    def __init__(self, path: Path, gpu_layers: int) -> None:
        """Load the file; ``gpu_layers`` -1 puts all layers on the GPU. Raises :class:`RuntimeFault`."""
        llama_cpp.llama_log_set(on_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        handle = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not handle:
            raise fault(f"cannot load {path}")
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
