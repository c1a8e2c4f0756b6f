"""The vocabulary, as llguidance wants it."""

from __future__ import annotations

import ctypes

import llama_cpp
from llguidance import LLTokenizer

from serving.llamacpp.runtime.model import Model

# llguidance's mark of tokens that text never stands for.
_SPECIAL = b"\xff"


def grammar_tokenizer(model: Model) -> LLTokenizer:
    """The model's vocabulary for llguidance; takes a second for a large one.

    Text is what :meth:`Model.piece` shows. Control tokens, and tags that a model's maker added
    (``<tool_call>``), can only be named by a grammar. The model must outlive the tokenizer.
    """
    vocab = llama_cpp.llama_model_get_vocab(model.handle)
    tokens = []
    ends = []
    for token in range(model.vocab_size):
        piece = model.piece(token)
        attributes = llama_cpp.llama_vocab_get_attr(vocab, token)
        is_added = attributes & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED
        if not piece or (is_added and piece.startswith(b"<") and piece.endswith(b">")):
            piece = _SPECIAL + model.token_text(token).encode()
        tokens.append(piece)
        if model.ends_generation(token):
            ends.append(token)
    tokenize = ctypes.cast(llama_cpp.llama_cpp._lib.llama_tokenize, ctypes.c_void_p)
    tokenizer: LLTokenizer = LLTokenizer.from_llamacpp(  # type: ignore[attr-defined]
        tokens=tokens, vocab_ptr=vocab, tokenize_fptr=tokenize.value, eos_token=ends, slices=None
    )
    return tokenizer
