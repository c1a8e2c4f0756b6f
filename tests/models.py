"""Embedding models and rerankers for the tests, converted to GGUF as llama.cpp's own scripts do it."""

from __future__ import annotations

import importlib.util
import json
import struct
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[np.float32]

# all-MiniLM-L6-v2 (Apache-2.0), a sentence-transformers model; the package holds only its files.
_MINILM_PACKAGE, _MINILM_FILE = "all_minilm_l6_v2", "model.zip"
_MINILM_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
LAYERS, HEADS, WIDTH = 6, 12, 384


@cache
def minilm_tensors() -> Mapping[str, Tensor]:
    """all-MiniLM-L6-v2's weights by their Hugging Face names."""
    data = _minilm_file("model.safetensors")
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            start, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[start:end], "<f4").reshape(entry["shape"])
    return tensors


def _minilm_file(name: str) -> bytes:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    assert spec is not None, "run make test: it installs the model's package"
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).with_name(_MINILM_FILE)) as archive:
        return archive.read(name)


def write_minilm_folder(folder: Path) -> Path:
    """all-MiniLM-L6-v2 in Hugging Face's format, as its package holds it."""
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    assert spec is not None, "run make test: it installs the model's package"
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).with_name(_MINILM_FILE)) as archive:
        archive.extractall(folder)
    return folder


def write_minilm(path: Path, *, head: Tensor | None = None) -> Path:
    """all-MiniLM-L6-v2 as a GGUF file; with a ``head`` [1, WIDTH] as a reranker that scores with it."""
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN if head is None else gguf.PoolingType.RANK)
    _add_wordpieces(writer)
    for name, tensor in minilm_tensors().items():
        if not name.startswith("pooler."):
            writer.add_tensor(_gguf_name(name), tensor)
    if head is not None:
        writer.add_tensor("cls.output.weight", head)
    return _finish(writer, path)


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("encoder.layer."):
        return f"{_MINILM_NAMES[stem]}.{kind}"
    _, _, layer, stem = stem.split(".", 3)
    return f"blk.{layer}.{_MINILM_NAMES[stem]}.{kind}"


def _add_wordpieces(writer: gguf.GGUFWriter) -> None:
    vocabulary = json.loads(_minilm_file("tokenizer.json"))["model"]["vocab"]
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    # llama.cpp marks the pieces that begin a word, WordPiece those that go on with one.
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list(
        [p if p in special else p[2:] if p.startswith("##") else f"\u2581{p}" for p in pieces]
    )
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_types([control if piece in special else normal for piece in pieces])
    writer.add_unk_token_id(special["[UNK]"])
    writer.add_sep_token_id(special["[SEP]"])
    writer.add_pad_token_id(special["[PAD]"])
    writer.add_mask_token_id(special["[MASK]"])
    writer.add_bos_token_id(special["[CLS]"])


def minilm_states(tokens: list[int]) -> Tensor:
    """BERT in NumPy: the last hidden state of each token, ``[len(tokens), WIDTH]``."""
    weights = minilm_tensors()

    def linear(x: Tensor, name: str) -> Tensor:
        return np.asarray(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return np.asarray(scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def heads(x: Tensor) -> Tensor:
        return x.reshape(len(tokens), HEADS, -1).transpose(1, 0, 2)

    x = norm(
        weights["embeddings.word_embeddings.weight"][tokens]
        + weights["embeddings.position_embeddings.weight"][: len(tokens)]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "embeddings.LayerNorm",
    )
    for layer in range(LAYERS):
        block = f"encoder.layer.{layer}"
        q, k, v = (
            heads(linear(x, f"{block}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        attention = _softmax(q @ k.transpose(0, 2, 1) / np.sqrt(WIDTH / HEADS)) @ v
        mixed = attention.transpose(1, 0, 2).reshape(len(tokens), WIDTH)
        attended = linear(mixed, f"{block}.attention.output.dense")
        x = norm(x + attended, f"{block}.attention.output.LayerNorm")
        inner = _gelu(linear(x, f"{block}.intermediate.dense"))
        x = norm(x + linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm")
    return x


def _softmax(x: Tensor) -> Tensor:
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(exponents / exponents.sum(-1, keepdims=True))


def _gelu(x: Tensor) -> Tensor:
    # The tanh form, as ggml computes it; it differs from the exact one in the fourth digit.
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def with_pooling(source: Path, path: Path, pooling: gguf.PoolingType) -> Path:
    """A copy of a generating model that says how its hidden states are pooled."""
    reader = _read(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    _copy_fields(reader, writer)
    writer.add_pooling_type(pooling)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return _finish(writer, path)


def write_causal_reranker(path: Path, vocabulary: Path, *, head: Tensor) -> Path:
    """A reranker of Qwen3-Reranker's shape: a template, and a ``head`` [2, width] for "yes" and "no".

    One layer of random weights, with the vocabulary of another GGUF file.
    """
    reader = _read(vocabulary)
    random = np.random.default_rng(1)
    width, head_width = head.shape[1], 32

    def matrix(rows: int, columns: int) -> Tensor:
        return random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    writer = gguf.GGUFWriter(path, "qwen3")
    _copy_fields(reader, writer, only="tokenizer.ggml.")
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(width // head_width)
    writer.add_head_count_kv(width // head_width)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_pooling_type(gguf.PoolingType.RANK)
    writer.add_classifier_output_labels(["yes", "no"])
    template = "<|im_start|>user\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    writer.add_chat_template([{"name": "rerank", "template": template}])
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    tensors = {
        "token_embd": matrix(tokens, width),
        "output_norm": np.ones(width, np.float32),
        "cls.output": head,
        "blk.0.attn_norm": np.ones(width, np.float32),
        "blk.0.attn_q": matrix(width, width),
        "blk.0.attn_k": matrix(width, width),
        "blk.0.attn_v": matrix(width, width),
        "blk.0.attn_output": matrix(width, width),
        "blk.0.attn_q_norm": np.ones(head_width, np.float32),
        "blk.0.attn_k_norm": np.ones(head_width, np.float32),
        "blk.0.ffn_norm": np.ones(width, np.float32),
        "blk.0.ffn_gate": matrix(2 * width, width),
        "blk.0.ffn_up": matrix(2 * width, width),
        "blk.0.ffn_down": matrix(width, 2 * width),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    return _finish(writer, path)


@cache
def _read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)  # takes seconds


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, only: str = "") -> None:
    for name, field in reader.fields.items():
        if name.startswith(only) and not name.startswith(("GGUF.", "general.architecture")):
            item: Any = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hidden_states(path: Path, tokens: list[int]) -> Tensor:
    """The last hidden state of each token, unpooled, straight from llama.cpp."""
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.embeddings = True
    params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    context = llama_cpp.llama_init_from_model(model, params)
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
    pointer = llama_cpp.llama_get_embeddings(context)
    width = llama_cpp.llama_model_n_embd(model)
    states = np.ctypeslib.as_array(pointer, (len(tokens), width)).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return states
