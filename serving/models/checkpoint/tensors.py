"""Which of a checkpoint's tensors becomes which of a GGUF file's, and how it is laid out there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from serving.models.checkpoint.config import Config, UnfitCheckpoint
from serving.models.checkpoint.families import Family
from serving.models.safetensors import StoredTensor, Words, as_floats

_KINDS = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
_CHUNK_BYTES = 16 << 20
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Computed anew by every program that loads the model.
_BUFFERS = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attn.bias")
# The parts of a model that sees; what is left is the text part.
_SEEING = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the GGUF file: the values of ``parts``, one after the other, read when it is written.

    ``shape`` begins with the slowest dimension. A part's own axes may be in another order than the file has it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[StoredTensor, ...]
    offset: float = 0.0

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        """As the gguf library numbers it."""
        return _KINDS[self.dtype]

    @property
    def nbytes(self) -> int:
        """In the GGUF file. Named, as is :meth:`tofile`, as NumPy names it: gguf's writer takes this for an array."""
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)

    def tofile(self, file: BinaryIO) -> None:
        """Write the values in small pieces."""
        for part in self.parts:
            for words in _chunks(part.words):
                values = words
                if part.dtype != self.dtype or self.offset:
                    values = as_floats(words, part.dtype) + np.float32(self.offset)
                file.write(np.ascontiguousarray(values).data)


def _chunks(words: Words) -> Iterator[Words]:
    step = max(1, _CHUNK_BYTES * len(words) // max(1, words.nbytes))
    for start in range(0, len(words), step):
        yield words[start : start + step]


def plan_tensors(
    stored: Mapping[str, StoredTensor], config: Config, family: Family
) -> list[Tensor]:
    """The tensors of the GGUF file; raises :class:`UnfitCheckpoint`, which names the tensor."""
    texts = {
        _text_name(name): tensor
        for name, tensor in stored.items()
        if not name.startswith(_SEEING) and not name.endswith(_BUFFERS)
    }
    _check_output(texts, config)
    names = gguf.get_tensor_name_map(family.kind, config.layers)
    tensors = []
    for name, parts in _gathered(texts, config).items():
        stem, suffix = name.removesuffix(".weight"), ".weight"
        if name.endswith(".bias"):
            stem, suffix = name.removesuffix(".bias"), ".bias"
        known = names.get_name(stem)
        if known is None:
            raise UnfitCheckpoint(
                f"its tensor {name!r} is not known of {family.architecture!r} models"
            )
        tensors.append(_tensor(known + suffix, parts, config, family))
    return tensors


def _text_name(name: str) -> str:
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return name.removeprefix("language_model.")


def _check_output(texts: dict[str, StoredTensor], config: Config) -> None:
    """Leave out an output layer that is the embedding; llama.cpp would take the embedding for one that is missing."""
    is_tied = config.get("tie_word_embeddings")
    if is_tied is None:
        is_tied = _OUTPUT not in texts
    if is_tied:
        texts.pop(_OUTPUT, None)
    elif _OUTPUT not in texts:
        raise UnfitCheckpoint(f"its tensor {_OUTPUT!r} is missing")
    if _EMBEDDING not in texts:
        raise UnfitCheckpoint(f"its tensor {_EMBEDDING!r} is missing")


def _gathered(
    texts: Mapping[str, StoredTensor], config: Config
) -> dict[str, tuple[StoredTensor, ...]]:
    """The parts of each tensor by its name, in which the experts of a layer are one."""
    gathered: dict[str, dict[int, StoredTensor]] = {}
    for name, tensor in texts.items():
        if found := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+\.weight)", name):
            gathered.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        elif name.endswith(".experts.gate_up_proj"):  # [expert, gate's and up's rows, in]
            stem, rows = name.removesuffix("gate_up_proj"), tensor.words.shape[1] // 2
            for part, words in (
                ("gate_proj", tensor.words[:, :rows]),
                ("up_proj", tensor.words[:, rows:]),
            ):
                gathered[f"{stem}{part}.weight"] = _each(words, tensor.dtype)
        elif name.endswith(".experts.down_proj"):
            gathered[f"{name}.weight"] = _each(tensor.words, tensor.dtype)
        else:
            gathered[name] = {0: tensor}
    experts = config.get("num_local_experts") or config.get("num_experts")
    for name, parts in gathered.items():
        if ".experts." in name and sorted(parts) != list(range(experts or 0)):
            raise UnfitCheckpoint(
                f"of {name!r} it has {len(parts)} experts; its config says {experts}"
            )
    return {
        name: tuple(parts[index] for index in sorted(parts)) for name, parts in gathered.items()
    }


def _each(words: Words, dtype: str) -> dict[int, StoredTensor]:
    return {index: StoredTensor(expert, dtype) for index, expert in enumerate(words)}


def _tensor(name: str, parts: tuple[StoredTensor, ...], config: Config, family: Family) -> Tensor:
    shapes = {part.words.shape for part in parts}
    if len(shapes) != 1:
        raise UnfitCheckpoint(f"the experts of {name!r} are of several shapes")
    (shape,) = shapes
    is_norm = name.endswith("_norm.weight")
    dtypes = {part.dtype for part in parts}
    # What llama.cpp computes with in 32 bits only: vectors, and what chooses the experts.
    is_wide = len(shape) == 1 or "ffn_gate_inp" in name or len(dtypes) > 1
    if family.interleaves_heads:
        heads = {"attn_q": config.heads, "attn_k": config.key_value_heads}.get(name.split(".")[-2])
        if heads:
            parts = tuple(_interleaved(name, part, heads) for part in parts)
    return Tensor(
        name,
        (len(parts), *shape) if "_exps." in name else shape,
        "F32" if is_wide else dtypes.pop(),
        parts,
        family.norm_offset if is_norm else 0.0,
    )


def _interleaved(name: str, tensor: StoredTensor, heads: int) -> StoredTensor:
    """Hugging Face's order of a head's rows, all first halves of pairs then all second, made llama.cpp's.

    As LlamaModel.permute of llama.cpp's conversion scripts; nothing is copied.
    """
    words = tensor.words
    if len(words) % (2 * heads):
        raise UnfitCheckpoint(f"the {len(words)} rows of {name!r} do not fit {heads} heads")
    return StoredTensor(words.reshape(heads, 2, -1, *words.shape[1:]).swapaxes(1, 2), tensor.dtype)


def extra_tensors(values: Mapping[str, NDArray[np.float32]]) -> list[Tensor]:
    """Tensors that are computed, not stored."""
    return [
        Tensor(name, array.shape, "F32", (StoredTensor(array, "F32"),))
        for name, array in values.items()
    ]


def file_type(tensors: Iterable[Tensor]) -> gguf.LlamaFileType:
    """What most of the values are stored as."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    names = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}
    found: Any = gguf.LlamaFileType[names[max(sizes, key=lambda dtype: sizes[dtype])]]
    return gguf.LlamaFileType(found)
