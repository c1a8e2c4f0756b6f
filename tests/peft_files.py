"""LoRA adapters as PEFT saves them, and a Llama in NumPy with Hugging Face's weights that they apply to."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

# What Hugging Face calls a layer's matrices, and llama.cpp.
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_safetensors(path: Path, tensors: Mapping[str, Matrix], dtype: str = "F32") -> None:
    """Write tensors as F32, F16 or BF16; other types are in the header only."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        if dtype == "F16":
            raw = tensor.astype("<f2").tobytes()
        elif dtype == "BF16":
            raw = (tensor.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = tensor.astype("<f4").tobytes()
        offsets = [end, end := end + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data.append(raw)
    words = json.dumps(header).encode()
    path.write_bytes(b"".join([struct.pack("<Q", len(words)), words, *data]))


def write_peft(
    folder: Path, pairs: Mapping[str, tuple[Matrix, Matrix]], *, dtype: str = "F32", **config: Any
) -> Path:
    """A folder with an adapter: ``(A, B)`` by the module's name, and settings beside PEFT's usual ones."""
    folder.mkdir(parents=True)
    usual = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False}
    usual |= {"init_lora_weights": True, "modules_to_save": None, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(usual | config))
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": matrix
        for module, pair in pairs.items()
        for part, matrix in zip("AB", pair, strict=True)
    }
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    return folder


class Llama:
    """A Llama whose weights a GGUF file of F32 has, computed as Hugging Face's transformers does."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)

        def number(key: str) -> Any:
            return reader.fields[f"llama.{key}"].contents()

        self.layers: int = number("block_count")
        self._heads: int = number("attention.head_count")
        self._kv_heads: int = number("attention.head_count_kv")
        self._epsilon: float = number("attention.layer_norm_rms_epsilon")
        self._base: float = number("rope.freq_base")
        self._weights = {
            tensor.name.removesuffix(".weight"): dequantize(tensor.data, tensor.tensor_type).astype(
                np.float64
            )
            for tensor in reader.tensors
        }
        for name, weight in self._weights.items():
            heads = {"attn_q": self._heads, "attn_k": self._kv_heads}.get(name.rpartition(".")[2])
            if heads is not None:
                self._weights[name] = row_by_row(weight, heads)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a module such as ``model.layers.0.self_attn.q_proj``."""
        rows, columns = self._weights[_tensor(module)].shape
        return rows, columns

    def logits(
        self, tokens: list[int], lora: Mapping[str, tuple[Matrix, Matrix, float]]
    ) -> NDArray[np.float64]:
        """Of what follows the tokens; ``lora`` has A, B and the scale of B A by module."""

        def linear(x: NDArray[np.float64], layer: int, kind: str) -> NDArray[np.float64]:
            module = f"model.layers.{layer}.{kind}"
            y = x @ self._weights[_tensor(module)].T
            if module in lora:
                a, b, scale = lora[module]
                y = y + scale * (x @ a.T @ b.T)
            return np.asarray(y)

        x = self._weights["token_embd"][tokens]
        for layer in range(self.layers):
            normed = self._norm(x, f"blk.{layer}.attn_norm")
            q, k, v = (linear(normed, layer, f"self_attn.{part}_proj") for part in "qkv")
            mixed = self._attention(q, k, v)
            x = x + linear(mixed, layer, "self_attn.o_proj")
            normed = self._norm(x, f"blk.{layer}.ffn_norm")
            gate = linear(normed, layer, "mlp.gate_proj")
            inner = gate / (1 + np.exp(-gate)) * linear(normed, layer, "mlp.up_proj")
            x = x + linear(inner, layer, "mlp.down_proj")
        last = self._norm(x[-1:], "output_norm")[0]
        return np.asarray(self._weights["token_embd"] @ last)

    def _norm(self, x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + self._epsilon)
        return np.asarray(scaled * self._weights[name])

    def _attention(
        self, q: NDArray[np.float64], k: NDArray[np.float64], v: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        rows = len(q)

        def heads(x: NDArray[np.float64], count: int) -> NDArray[np.float64]:
            return x.reshape(rows, count, -1).transpose(1, 0, 2)

        group = self._heads // self._kv_heads
        queries = self._rotated(heads(q, self._heads))
        keys = self._rotated(heads(k, self._kv_heads)).repeat(group, axis=0)
        values = heads(v, self._kv_heads).repeat(group, axis=0)
        scores = queries @ keys.transpose(0, 2, 1) / np.sqrt(queries.shape[-1])
        scores[:, np.triu(np.ones((rows, rows), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.asarray((weights @ values).transpose(1, 0, 2).reshape(rows, -1))

    def _rotated(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rotary embeddings as transformers has them: the second half of a head goes with the first."""
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(x.shape[1]), self._base ** (-np.arange(half) / half))
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def _tensor(module: str) -> str:
    _, _, layer, kind = module.split(".", 3)
    return f"blk.{layer}.{MODULES[kind]}"


def row_by_row(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's order of rows, pair beside pair, made Hugging Face's, half beside half."""
    size = len(weight) // heads
    order = [
        head * size + 2 * pair + half
        for head in range(heads)
        for half in range(2)
        for pair in range(size // 2)
    ]
    return weight[order]
