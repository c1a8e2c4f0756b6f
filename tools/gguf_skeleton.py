"""GGUF files that are all header: the architecture of a real model, and weights that are holes in the file.

llama.cpp loads them as it does real ones, and says what memory it takes; the holes read as zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Recurrent,
    Weight,
)
from serving.planner.quantization import stored_weights, types_of, weight_bytes

_ALIGNMENT_BYTES = 32
# What llama.cpp calls a tensor in one family only.
_OTHER_NAMES = {("lfm2", "output_norm.weight"): "token_embd_norm.weight"}
_ROTATIONS = "rope_freqs.weight"
_Value = int | float | bool | list[int] | list[bool]


def write_skeleton(path: Path, architecture: Architecture, mixture: str) -> Path:
    """Write the file of a model in a mixture of quantizations, without its weights' bytes."""
    writer = gguf.GGUFWriter(path, architecture.family)
    for key, value in _metadata(architecture):
        _add(writer, f"{architecture.family}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    types = types_of(architecture, mixture) | {_ROTATIONS: "F32"}
    data_bytes = 0
    for weight in _weights(architecture):
        size_bytes = weight_bytes(weight, types[weight.name])
        writer.add_tensor_info(
            _name(architecture.family, weight.name),
            weight.shape[::-1],
            np.dtype(np.float32),  # the next argument counts
            size_bytes,
            raw_dtype=gguf.GGMLQuantizationType[types[weight.name]],
        )
        data_bytes += _aligned(size_bytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(_aligned(path.stat().st_size) + data_bytes)
    return path


def _weights(architecture: Architecture) -> Iterator[Weight]:
    """Those of the file, and what one family asks for beside them: a factor for each rotated pair."""
    yield from stored_weights(architecture)
    if architecture.family == "gemma4":
        yield Weight(_ROTATIONS, (_global(architecture.layers).key_width // 2,))


def _name(family: str, name: str) -> str:
    if family == "gemma4":  # its dense network beside the experts
        return name.replace("_shexp", "")
    return _OTHER_NAMES.get((family, name), name)


def _global(layers: tuple[Layer, ...]) -> Attention:
    """The attention of a layer that sees everything."""
    attentions = [layer.mixer for layer in layers if isinstance(layer.mixer, Attention)]
    return next((each for each in attentions if each.window_tokens is None), attentions[0])


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _metadata(architecture: Architecture) -> Iterator[tuple[str, _Value]]:
    """What decides sizes, and what llama.cpp asks for beside it."""
    layers = architecture.layers
    yield "vocab_size", architecture.vocabulary
    yield "context_length", architecture.context_length
    yield "embedding_length", architecture.width
    yield "block_count", len(layers)
    yield "attention.layer_norm_rms_epsilon", 1e-6
    yield "attention.layer_norm_epsilon", 1e-6
    # Asked for in some families; they change no size.
    yield "logit_scale", 1.0
    yield "rope.dimension_sections", [8, 12, 12, 0]
    yield "expert_gating_func", 2
    yield "embedding_length_per_layer_input", 0
    yield from _of_attention(layers)
    yield from _of_feed_forward(layers, architecture.family)
    yield from _of_recurrence(layers, architecture.width)


def _of_attention(layers: tuple[Layer, ...]) -> Iterator[tuple[str, _Value]]:
    mixers = [layer.mixer for layer in layers]
    latent = next((mixer for mixer in mixers if isinstance(mixer, LatentAttention)), None)
    if latent is not None:
        yield "attention.head_count", latent.heads
        yield "attention.head_count_kv", 1
        yield "attention.key_length", latent.kv_rank + latent.rope_width
        yield "attention.value_length", latent.kv_rank
        yield "attention.key_length_mla", latent.nope_width + latent.rope_width
        yield "attention.value_length_mla", latent.value_width
        yield "attention.kv_lora_rank", latent.kv_rank
        if latent.query_rank is not None:
            yield "attention.q_lora_rank", latent.query_rank
        yield "rope.dimension_count", latent.rope_width
        return
    attentions = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    if not attentions:
        yield "attention.head_count", 0
        return
    first = _global(layers)
    yield "attention.key_length", first.key_width
    yield "attention.value_length", first.value_width
    yield "attention.head_count", first.heads
    if any(isinstance(mixer, Recurrent) and mixer.kind == "gated_delta_net" for mixer in mixers):
        yield "attention.head_count_kv", first.kv_heads
    else:
        yield (
            "attention.head_count_kv",
            [mixer.kv_heads if isinstance(mixer, Attention) else 0 for mixer in mixers],
        )
    windows = [each for each in attentions if each.window_tokens is not None]
    if windows:
        yield "attention.sliding_window", windows[0].window_tokens or 0
        yield (
            "attention.sliding_window_pattern",
            [isinstance(each, Attention) and each.window_tokens is not None for each in mixers],
        )
        yield "attention.key_length_swa", windows[0].key_width
        yield "attention.value_length_swa", windows[0].value_width


def _of_feed_forward(layers: tuple[Layer, ...], family: str) -> Iterator[tuple[str, _Value]]:
    parts = [layer.feed_forward for layer in layers]
    experts = next((part for part in parts if isinstance(part, Experts)), None)
    yield "feed_forward_length", [_width(part, family) for part in parts]
    if experts is None:
        return
    yield "expert_count", experts.count
    yield "expert_used_count", experts.active
    yield "expert_feed_forward_length", experts.width
    yield "expert_shared_feed_forward_length", experts.shared_width
    yield "expert_shared_count", max(1, experts.shared_width // experts.width)
    dense = next(at for at, part in enumerate(parts) if isinstance(part, Experts))
    yield "leading_dense_block_count", dense
    yield "interleave_moe_layer_step", _step(parts)


def _width(part: FeedForward | Experts | None, family: str) -> int:
    if family == "gemma4" and isinstance(part, Experts):
        return part.shared_width
    return 0 if part is None else part.width


def _step(parts: list[FeedForward | Experts | None]) -> int:
    """Every how many layers has experts."""
    first, second = [at for at, part in enumerate(parts) if isinstance(part, Experts)][:2]
    return second - first


def _of_recurrence(layers: tuple[Layer, ...], width: int) -> Iterator[tuple[str, _Value]]:
    recurrent = next((layer.mixer for layer in layers if isinstance(layer.mixer, Recurrent)), None)
    if recurrent is None:
        return
    shapes = {weight.name: weight.shape for weight in recurrent.weights}
    if "ssm_out.weight" not in shapes:
        yield "shortconv.l_cache", recurrent.convolution_elements // width + 1
        return
    kernel, channels = shapes["ssm_conv1d.weight"]
    inner = shapes["ssm_out.weight"][0]
    state = recurrent.state_elements // inner
    yield "ssm.conv_kernel", kernel
    yield "ssm.inner_size", inner
    yield "ssm.state_size", state
    yield "ssm.group_count", (channels - inner) // (2 * state)
    yield "ssm.time_step_rank", max(shapes["ssm_a"])
    is_attention = [not isinstance(layer.mixer, Recurrent) for layer in layers]
    if any(is_attention):
        yield "full_attention_interval", is_attention.index(True) + 1


def _add(writer: gguf.GGUFWriter, key: str, value: _Value) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)
