"""Hugging Face folders of small models with random weights, and of the embedded model; NumPy only.

The small ones' settings and the names and shapes of their tensors, as transformers saves them, were recorded beside
the logits that transformers computed of them (``tests/engine/checkpoints/record.py``); the values are made anew.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from tests.peft_files import MODULES, Matrix, row_by_row, write_safetensors

RECORDED = Path(__file__).parent / "engine" / "checkpoints"
TOKENS = 320
# As long as no window of the recorded models is.
PROMPT = tuple(int(7 + 11 * index % 300) for index in range(40))

_GPT2_SPLIT = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A model's settings, its tensors' shapes by name, and transformers' logits after the prompt's last tokens."""

    config: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]
    logits: NDArray[np.float32]

    def write(self, folder: Path, dtype: str = "F32") -> Path:
        """Save it as transformers does."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        tensors = {name: values(name, shape) for name, shape in self.shapes.items()}
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder


def recorded(name: str) -> Recorded:
    """One of the recorded models."""
    entry = json.loads((RECORDED / "models.json").read_bytes())[name]
    logits = np.load(RECORDED / "logits.npz")[name]
    return Recorded(entry["config"], entry["shapes"], logits)


def values(name: str, shape: Sequence[int]) -> Matrix:
    """A tensor's values: the same on every machine. Norms are near 1, or 0; BF16 has all of them exactly."""
    # NumPy promises that this old generator's numbers stay as they are.
    random = np.random.RandomState(zlib.crc32(name.encode()))
    deviation = 0.2 if len(shape) == 1 else 1.4 * shape[-1] ** -0.5
    if name.endswith("embed_tokens.weight"):
        deviation = 0.5
    array = random.standard_normal(tuple(shape)) * deviation + (0.8 if "norm" in name else 0)
    return (array.astype("<f4").view("<u4") & 0xFFFF0000).view("<f4")


def write_byte_tokenizer(folder: Path, *, merges: Sequence[str] = ("Ġ t", "h e")) -> None:
    """A tokenizer of Qwen 2's kind: the bytes, a few merges, and two special tokens."""
    letters = _byte_letters()
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    split = {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False}
    level = _GPT2_SPLIT | {"use_regex": False}
    write_tokenizer(
        folder,
        {"type": "BPE", "vocab": vocabulary, "merges": list(merges), "ignore_merges": False},
        added={"<|end|>": len(tokens), "<|user|>": len(tokens) + 1},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]},
    )


def write_space_tokenizer(folder: Path, *, prefix: bool = True, phi3: bool = False) -> None:
    """A tokenizer of Llama 2's kind, without the prefix of Gemma's, or of Phi-3's: bytes, letters, a few merges."""
    special = ["<unk>", "<s>", "</s>"]
    swallowing = ["</s>", "<|user|>"] if phi3 else []
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = list("▁abcdefghinorstuw")
    merges = ["▁ t", "h e", "▁t he", "i n", "▁ a"]
    tokens = [*special, *raw, *letters, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    names = ["<|endoftext|>", "<|user|>"] if phi3 else []
    late = {token: len(tokens) + index for index, token in enumerate(names)}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace] if prefix else [replace]
    write_tokenizer(
        folder,
        {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True,
         "unk_token": "<unk>", "fuse_unk": True},
        added={token: index for index, token in enumerate(special)} | late,
        swallowing=swallowing,
        normalizer={"type": "Sequence", "normalizers": steps},
    )  # fmt: skip


def write_tokenizer(
    folder: Path,
    model: Mapping[str, Any],
    *,
    added: Mapping[str, int],
    swallowing: Sequence[str] = (),
    **steps: Any,
) -> None:
    """A ``tokenizer.json`` whose added tokens are special, and a chat template.

    Those that are ``swallowing`` take the spaces after them away.
    """
    names = list(added)
    extra = [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False,
         "rstrip": token in swallowing, "normalized": False}
        for token, index in added.items()
    ]  # fmt: skip
    content = {"version": "1.0", "added_tokens": extra, "model": model, **steps}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": names[0], "eos_token": names[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)


def _byte_letters() -> list[str]:
    """How GPT-2 writes the 256 bytes as letters."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def write_embedded(
    folder: Path, source: Path, changes: Mapping[str, Matrix] | None = None, dtype: str = "BF16"
) -> Path:
    """The model of a GGUF file of Llama's architecture as a Hugging Face folder; ``changes`` are added to modules."""
    reader = _read(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    folder.mkdir(parents=True)
    heads, kv_heads = (field(f"llama.attention.head_count{end}") for end in ("", "_kv"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "max_position_embeddings": field("llama.context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": field("llama.block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {ours: theirs for theirs, ours in MODULES.items()}
    parts |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    tensors = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem not in names:
            _, layer, part = stem.split(".")
            names[stem] = f"model.layers.{layer}.{parts[part]}"
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        own_heads = {"attn_q": heads, "attn_k": kv_heads}.get(stem.rpartition(".")[2])
        if own_heads is not None:
            weights = row_by_row(weights, own_heads)
        name = names[stem]
        if changes and name in changes:
            weights = weights + changes[name]
        tensors[f"{name}.weight"] = weights
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    write_embedded_tokenizer(folder, source)
    return folder


@cache
def _read(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)  # takes seconds


def write_embedded_tokenizer(folder: Path, source: Path) -> None:
    """The tokenizer of a GGUF file that has the embedded model's."""
    reader = _read(source)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    tokens: list[str] = field("tokenizer.ggml.tokens")
    kinds: list[int] = field("tokenizer.ggml.token_type")
    control = [index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    model = {
        "type": "BPE",
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": field("tokenizer.ggml.merges"),
    }
    digits = {"type": "Digits", "individual_digits": True}
    write_tokenizer(
        folder,
        model,
        added={tokens[index]: index for index in control},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, _GPT2_SPLIT]},
    )
    special = {
        f"{name}_token": tokens[field(f"tokenizer.ggml.{name}_token_id")] for name in ("bos", "eos")
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "chat_template.jinja").write_text(field("tokenizer.chat_template"))
