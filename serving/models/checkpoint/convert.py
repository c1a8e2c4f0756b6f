"""A model that is saved as a Hugging Face folder, converted to a GGUF file.

What cannot be converted without changing what the model does is refused by name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from serving.models.checkpoint.config import Config, UnfitCheckpoint
from serving.models.checkpoint.families import family_of, write_parameters
from serving.models.checkpoint.proof import prove
from serving.models.checkpoint.rope import read_rope
from serving.models.checkpoint.tensors import extra_tensors, file_type, plan_tensors
from serving.models.checkpoint.vocabulary import Vocabulary, read_vocabulary
from serving.models.requantize import requantize, type_name
from serving.models.safetensors import SafetensorsError, read_checkpoint
from serving.models.sources import ModelError

_PHI3 = re.compile("phi-?3", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Converted:
    """``left_out`` are tokens of the tokenizer for which the model has no embedding."""

    tensors: int
    quantization: str
    left_out: tuple[str, ...]


def convert_checkpoint(folder: Path, target: Path, quantization: str | None) -> Converted:
    """Write the model in a Hugging Face ``folder`` as a GGUF file, as its weights are or quantized.

    ``target`` appears whole or not at all. llama.cpp has loaded it, and its tokens were compared with those of the
    folder's tokenizer. Meanwhile there is a second file beside it if it is quantized. Raises :class:`ModelError`.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    quantized = target.with_name(f"{target.name}.{os.getpid()}.quantized.partial")
    try:
        name = target.stem.removesuffix(f"-{quantization}")
        plain, tensors, left_out = _write(folder, partial, name)
        prove(partial, folder)
        if quantization is None or quantization == plain:
            partial.replace(target)
        else:
            requantize(partial, quantized, quantization)
            quantized.replace(target)
    except (UnfitCheckpoint, SafetensorsError) as error:
        raise ModelError(f"cannot convert {folder}: {error}") from error
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ModelError(f"cannot convert {folder}:{where} {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
        quantized.unlink(missing_ok=True)
    return Converted(tensors, quantization or plain, left_out)


def _write(folder: Path, path: Path, name: str) -> tuple[str, int, tuple[str, ...]]:
    """The file with the weights as they are: its type, how many tensors it has, and tokens that were left out."""
    config = Config.read(folder)
    family = family_of(config)
    rope = read_rope(config)
    tensors = plan_tensors(read_checkpoint(folder), config, family)
    (embedding,) = (each for each in tensors if each.name == "token_embd.weight")
    count = embedding.shape[0]
    vocabulary = read_vocabulary(folder, count)
    kind = file_type(tensors)
    tensors = extra_tensors(rope.tensors) + tensors

    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_name(_name(name, vocabulary))
    write_parameters(config, family, rope, count, writer)
    writer.add_file_type(kind)
    vocabulary.write(writer, folder)
    float32 = np.dtype(np.float32)
    for tensor in tensors:
        # The kind is what counts; NumPy has no BF16.
        writer.add_tensor_info(tensor.name, tensor.shape, float32, tensor.nbytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            # It asks of an array only what a Tensor has, too, which never is in memory as a whole.
            array: Any = tensor
            writer.write_tensor_data(array)
    finally:
        writer.close()
    return type_name(kind) or "", len(tensors), tuple(vocabulary.left_out)


def _name(name: str, vocabulary: Vocabulary) -> str:
    """The file's, made to have or not to have what llama.cpp knows Phi-3's tokenizer by (src/llama-vocab.cpp)."""
    if vocabulary.strips_like_phi3:
        return name if _PHI3.search(name) else f"{name} (Phi-3)"
    return _PHI3.sub("phi", name)
