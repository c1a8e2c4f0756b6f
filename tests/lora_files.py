"""Makes LoRA adapters as GGUF files, and small models with an adapter merged into their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank changes by the tensor they apply to: ``(A, B)`` with A ``[rank, in]``, B ``[out, rank]``."""

    pairs: Mapping[str, tuple[Matrix, Matrix]]
    alpha: float

    def change(self, tensor: str) -> Matrix:
        """What is added to a weight at scale 1: B A alpha / rank."""
        a, b = self.pairs[tensor]
        return b @ a * np.float32(self.alpha / len(a))


def random_lora(shapes: Mapping[str, tuple[int, int]], *, seed: int, rank: int = 4) -> Lora:
    """An adapter for tensors of shape ``(out, in)``, strong enough to change what the model says."""
    random = np.random.default_rng(seed)
    pairs = {}
    for name, (rows, columns) in shapes.items():
        a = random.normal(0, columns**-0.5, (rank, columns)).astype(np.float32)
        b = random.normal(0, 0.3, (rows, rank)).astype(np.float32)
        pairs[name] = (a, b)
    return Lora(pairs, alpha=2.0 * rank)


def write_lora(path: Path, lora: Lora, *, architecture: str = "llama", **fields: Any) -> Path:
    """Write an adapter; ``fields`` replace its ``type``, ``adapter_type`` and ``alpha`` (None: left out).

    A field ``extra`` is the name of one more tensor.
    """
    extra: str | None = fields.pop("extra", None)
    fields = {"type": "adapter", "adapter_type": "lora", "alpha": lora.alpha} | fields
    keys = {"type": "general.type", "adapter_type": "adapter.type", "alpha": "adapter.lora.alpha"}
    kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
    writer = gguf.GGUFWriter(path, architecture)
    for field, value in fields.items():
        if value is not None:
            writer.add_key_value(
                keys[field], value, kinds.get(type(value), gguf.GGUFValueType.UINT32)
            )
    for name, (a, b) in lora.pairs.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    if extra is not None:
        writer.add_tensor(extra, np.ones((2, 2), np.float32))
    return _finish(writer, path)


def write_model(
    path: Path,
    source: Path,
    *,
    layers: int,
    lora: Lora | None = None,
    scale: float = 0.0,
    vocabulary: int | None = None,
) -> Path:
    """Write the first layers of a model as F32, with an adapter, if there is one, merged into them.

    With full precision, what differs from the adapter applied by llama.cpp is the rounding of float32. Of the
    ``vocabulary`` only the first so many tokens are kept: those for which byte pairs were merged first.
    """
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()[:vocabulary]
    fewer = {}
    if vocabulary is not None:
        known, merges = set(tokens), reader.fields["tokenizer.ggml.merges"].contents()
        fewer = {
            f"{architecture}.vocab_size": vocabulary,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": reader.fields["tokenizer.ggml.token_type"].contents()[
                :vocabulary
            ],
            "tokenizer.ggml.merges": [pair for pair in merges if pair.replace(" ", "") in known],
        }
    for field in reader.fields.values():
        if field.name == f"{architecture}.block_count":
            writer.add_block_count(layers)
        elif field.name == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        elif not field.name.startswith("GGUF.") and field.name != "general.architecture":
            is_array = field.types[0] is gguf.GGUFValueType.ARRAY
            item_type = field.types[1] if is_array else None
            value = fewer[field.name] if field.name in fewer else field.contents()
            writer.add_key_value(field.name, value, field.types[0], item_type)
    for tensor in reader.tensors:
        family, _, rest = tensor.name.partition(".")
        if family == "blk" and int(rest.partition(".")[0]) >= layers:
            continue
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name == "token_embd.weight":
            weights = weights[:vocabulary]
        if lora is not None and tensor.name in lora.pairs:
            weights = weights + np.float32(scale) * lora.change(tensor.name)
        writer.add_tensor(tensor.name, weights)
    return _finish(writer, path)


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
