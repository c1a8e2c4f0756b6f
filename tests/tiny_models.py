"""Models and projectors (mmproj) with random weights: tiny, but whole in every mechanical way.

Each has the shape of a real family's, as llama.cpp's conversion scripts write it: SmolVLM's projector
tiles an image, Gemma 3's is attended to without a causal mask, Qwen2-VL's takes positions in two
dimensions, Mamba has a state in place of a cache. What they say is nonsense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[np.float32]

# SmolLM2-135M's width, and that of the language model below.
SMOLLM2_WIDTH, QWEN_WIDTH = 576, 64

_WIDTH, _HEADS, _INNER, _LAYERS = 32, 2, 64, 2
# A tile of 64 x 64 pixels has 8 x 8 patches, and 4 x 4 tokens; SmolVLM's overview and tiles are such.
TILE_PIXELS, TILE_TOKENS = 64, 16
_PATCH, _MERGE = 8, 2
_LONGEST_EDGE = 2 * TILE_PIXELS


def write_smolvlm_projector(path: Path, width: int = SMOLLM2_WIDTH) -> Path:
    """As of SmolVLM: an overview and up to 2 x 2 tiles, with tokens of the vocabulary between them."""
    random = _Weights()
    writer = _vision_writer(path, gguf.VisionProjectorType.IDEFICS3, width)
    writer.add_vision_projector_scale_factor(_MERGE)
    writer.add_vision_preproc_image_size(_LONGEST_EDGE)
    _add_siglip(writer, random)
    writer.add_tensor("mm.model.fc.weight", random.matrix(width, _WIDTH * _MERGE**2))
    return _finish(writer)


def write_gemma3_projector(path: Path, width: int = SMOLLM2_WIDTH) -> Path:
    """As of Gemma 3: one tile whatever the image's size, whose tokens see each other."""
    random = _Weights()
    writer = _vision_writer(path, gguf.VisionProjectorType.GEMMA3, width)
    writer.add_vision_projector_scale_factor(_MERGE)
    _add_siglip(writer, random)
    writer.add_tensor("mm.input_projection.weight", random.matrix(_WIDTH, width))
    writer.add_tensor("mm.soft_emb_norm.weight", np.ones(_WIDTH, np.float32))
    return _finish(writer)


def write_qwen2vl_projector(path: Path, width: int = QWEN_WIDTH) -> Path:
    """As of Qwen2-VL: as many tokens as the image needs, at positions in two dimensions."""
    random = _Weights()
    writer = _vision_writer(path, gguf.VisionProjectorType.QWEN2VL, width)
    _add_layers(writer, random)
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        writer.add_tensor(name, random.patches())
    merged = _WIDTH * _MERGE**2
    for name, rows in (("mm.0", merged), ("mm.2", width)):
        writer.add_tensor(f"{name}.weight", random.matrix(rows, merged))
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))
    return _finish(writer)


def write_qwen2vl(path: Path, vocabulary: Path) -> Path:
    """A language model of Qwen2-VL's shape: random weights, the vocabulary of another GGUF file."""
    random, width, head_width = _Weights(), QWEN_WIDTH, 32
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(path, "qwen2vl")
    _copy_fields(reader, writer, only="tokenizer.")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(width // head_width)
    writer.add_head_count_kv(width // head_width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_sections([4, 6, 6, 0])
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_tensor("token_embd.weight", random.matrix(tokens, width))
    writer.add_tensor("output.weight", random.matrix(tokens, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", random.matrix(width, width))
            writer.add_tensor(f"blk.{layer}.{name}.bias", np.zeros(width, np.float32))
        writer.add_tensor(f"blk.{layer}.attn_output.weight", random.matrix(width, width))
        writer.add_tensor(f"blk.{layer}.ffn_gate.weight", random.matrix(2 * width, width))
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", random.matrix(2 * width, width))
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", random.matrix(width, 2 * width))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    return _finish(writer)


def write_wide_cache(path: Path, vocabulary: Path) -> Path:
    """A small language model whose cache is large, 32 KiB a token: memory is full before much is computed."""
    random, width, heads, head_width = _Weights(), 64, 32, 128
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(path, "llama")
    _copy_fields(reader, writer, only="tokenizer.")
    writer.add_block_count(2)
    writer.add_context_length(32768)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_tensor("token_embd.weight", random.matrix(tokens, width))
    writer.add_tensor("output.weight", random.matrix(tokens, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v"):
            writer.add_tensor(
                f"blk.{layer}.{name}.weight", random.matrix(heads * head_width, width)
            )
        writer.add_tensor(
            f"blk.{layer}.attn_output.weight", random.matrix(width, heads * head_width)
        )
        writer.add_tensor(f"blk.{layer}.ffn_gate.weight", random.matrix(2 * width, width))
        writer.add_tensor(f"blk.{layer}.ffn_up.weight", random.matrix(2 * width, width))
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", random.matrix(width, 2 * width))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    return _finish(writer)


def write_mamba(path: Path, vocabulary: Path) -> Path:
    """A recurrent language model: random weights, the vocabulary of another GGUF file."""
    random, width, inner, state, rank, kernel = _Weights(), 64, 128, 16, 4, 4
    reader = gguf.GGUFReader(vocabulary)
    writer = gguf.GGUFWriter(path, "mamba")
    _copy_fields(reader, writer, only="tokenizer.")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data)
    writer.add_tensor("token_embd.weight", random.matrix(tokens, width))
    writer.add_tensor("output.weight", 3 * random.matrix(tokens, width))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    decay = np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1))
    for layer in range(2):
        tensors = {
            "attn_norm.weight": np.ones(width, np.float32),
            "ssm_in.weight": random.matrix(2 * inner, width),
            "ssm_conv1d.weight": random.matrix(inner, kernel),
            "ssm_conv1d.bias": np.zeros(inner, np.float32),
            "ssm_x.weight": random.matrix(rank + 2 * state, inner),
            "ssm_dt.weight": random.matrix(inner, rank),
            "ssm_dt.bias": np.full(inner, -2, np.float32),
            "ssm_a": -0.2 * decay,
            "ssm_d": np.ones(inner, np.float32),
            "ssm_out.weight": 2 * random.matrix(width, inner),
        }
        for name, tensor in tensors.items():
            writer.add_tensor(f"blk.{layer}.{name}", tensor)
    return _finish(writer)


def with_smolvlm_tokens(source: Path, path: Path) -> Path:
    """A copy of SmolLM2 with SmolVLM's tokens around images, in place of two that code has."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "llama")
    renamed = {"<repo_name>": "<fake_token_around_image>", "<gh_stars>": "<global-img>"}
    _copy_fields(reader, writer, leave_out="tokenizer.ggml.tokens")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    writer.add_token_list([renamed.get(token, token) for token in tokens])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return _finish(writer)


class _Weights:
    def __init__(self) -> None:
        self._random = np.random.default_rng(1)

    def matrix(self, rows: int, columns: int) -> Tensor:
        return self._random.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)

    def patches(self) -> Tensor:
        return self.matrix(_WIDTH, 3 * _PATCH**2).reshape(_WIDTH, 3, _PATCH, _PATCH)


def _vision_writer(path: Path, projector: str, width: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_projection_dim(width)
    writer.add_vision_image_size(TILE_PIXELS)
    writer.add_vision_patch_size(_PATCH)
    writer.add_vision_embedding_length(_WIDTH)
    writer.add_vision_feed_forward_length(_INNER)
    writer.add_vision_block_count(_LAYERS)
    writer.add_vision_head_count(_HEADS)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_vision_use_gelu(True)
    return writer


def _add_siglip(writer: gguf.GGUFWriter, random: _Weights) -> None:
    """The encoder of SmolVLM and Gemma 3."""
    patches = (TILE_PIXELS // _PATCH) ** 2
    writer.add_tensor("v.patch_embd.weight", random.patches())
    writer.add_tensor("v.patch_embd.bias", np.zeros(_WIDTH, np.float32))
    writer.add_tensor("v.position_embd.weight", random.matrix(patches, _WIDTH))
    _add_layers(writer, random)


def _add_layers(writer: gguf.GGUFWriter, random: _Weights) -> None:
    def add(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", random.matrix(rows, columns))
        writer.add_tensor(f"{name}.bias", np.zeros(rows, np.float32))

    for layer in range(_LAYERS):
        block = f"v.blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add(f"{block}.{part}", _WIDTH, _WIDTH)
        add(f"{block}.ffn_up", _INNER, _WIDTH)
        add(f"{block}.ffn_down", _WIDTH, _INNER)
        _add_norm(writer, f"{block}.ln1")
        _add_norm(writer, f"{block}.ln2")
    _add_norm(writer, "v.post_ln")


def _add_norm(writer: gguf.GGUFWriter, name: str) -> None:
    writer.add_tensor(f"{name}.weight", np.ones(_WIDTH, np.float32))
    writer.add_tensor(f"{name}.bias", np.zeros(_WIDTH, np.float32))


def _copy_fields(
    reader: gguf.GGUFReader, writer: gguf.GGUFWriter, *, only: str = "", leave_out: str = " "
) -> None:
    for name, field in reader.fields.items():
        own = name.startswith(("GGUF.", "general.architecture", leave_out))
        if name.startswith(only) and not own:
            item: Any = field.types[1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)


def _finish(writer: gguf.GGUFWriter) -> Path:
    assert writer.path is not None
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)
