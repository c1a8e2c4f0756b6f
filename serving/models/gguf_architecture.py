"""From the header of a GGUF file to an architecture.

What llama.cpp knows of a family beside its file's metadata (``src/models/*.cpp``) is known here, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    Recurrent,
    UnreadArchitecture,
    Weight,
)
from serving.models.gguf import Header, Tensor

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
# Each so manieth layer sees everything, the others a window, where the file does not say which.
_GLOBAL_INTERVALS = {
    "gemma2": 2,
    "gpt-oss": 2,
    "cohere2": 4,
    "exaone4": 4,
    "llama4": 4,
    "olmo2": 4,
    "gemma3n": 5,
    "gemma3": 6,
    "plamo3": 8,
}
_DEFAULT_WINDOW_TOKENS = {"gemma2": 4096, "exaone4": 4096}
_LLAMA4_CHUNK_TOKENS = 8192
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"


def architecture_of_header(header: Header) -> Architecture:
    """The architecture that a GGUF file's header describes; raises :class:`UnreadArchitecture`.

    Layers that only draft tokens (``nextn``) are left out.
    """
    metadata = _Metadata(header)
    embeddings = header.tensors.get(_EMBEDDINGS)
    if embeddings is None:
        raise UnreadArchitecture(f"it is no language model: it has no {_EMBEDDINGS}")
    try:
        return _read(header, metadata, embeddings)
    except (ValueError, IndexError) as error:
        raise UnreadArchitecture(
            f"shapes of its tensors are not as llama.cpp's: {error}"
        ) from error


def _read(header: Header, metadata: _Metadata, embeddings: Tensor) -> Architecture:
    width, vocabulary = embeddings.shape
    by_layer, beside = _by_layer(header.tensors)
    del beside[_EMBEDDINGS]
    has_output = beside.pop(_OUTPUT, None) is not None
    count = metadata.number("block_count") - metadata.number("nextn_predict_layers", 0)
    missing = count - len(by_layer.keys() & range(count))
    if missing:
        raise UnreadArchitecture(f"{missing} of its {count} layers have no tensors")
    return Architecture(
        family=metadata.family,
        width=width,
        vocabulary=vocabulary,
        context_length=metadata.number("context_length"),
        layers=tuple(_layer(metadata, index, by_layer[index]) for index in range(count)),
        has_tied_embeddings=not has_output,
        weights_beside_layers=_weights(beside),
        is_encoder=header.integer(f"{metadata.family}.attention.causal") == 0,
    )


class _Metadata:
    """The metadata of a model's family."""

    def __init__(self, header: Header) -> None:
        self._header = header
        family = header.text("general.architecture")
        if family is None:
            raise UnreadArchitecture("its metadata has no general.architecture")
        self.family = family

    def number(self, key: str, default: int | None = None) -> int:
        """A figure of the whole model."""
        found = self._header.integer(f"{self.family}.{key}")
        if found is None:
            found = default
        if found is None:
            raise UnreadArchitecture(f"its metadata has no {self.family}.{key}")
        return found

    def of_layer(self, key: str, index: int, default: int | None = None) -> int:
        """A figure of one layer, where layers may differ."""
        items = self._header.integers(f"{self.family}.{key}")
        if not items:
            return self.number(key, default)
        if len(items) > 1 and index >= len(items):
            raise UnreadArchitecture(f"its {self.family}.{key} has no item for layer {index}")
        return items[index if len(items) > 1 else 0]

    def window_tokens(self, index: int) -> int | None:
        """How far back a layer's attention looks; None: to the beginning."""
        window = self.number("attention.sliding_window", _DEFAULT_WINDOW_TOKENS.get(self.family, 0))
        if self.family == "llama4":
            is_given = self._header.integer("llama4.attention.sliding_window") is not None
            window = 0 if is_given and not window else _LLAMA4_CHUNK_TOKENS
        pattern = self._header.integers(f"{self.family}.attention.sliding_window_pattern")
        if len(pattern) > 1:
            is_local = self.of_layer("attention.sliding_window_pattern", index) != 0
        else:
            interval = pattern[0] if pattern else _GLOBAL_INTERVALS.get(self.family, 1)
            is_local = index % interval < interval - 1
        return window if window and is_local else None


def _by_layer(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    by_layer: dict[int, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _LAYER.fullmatch(name):
            by_layer.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            beside[name] = tensor
    return by_layer, beside


def _weights(tensors: Mapping[str, Tensor], experts: int = 1) -> tuple[Weight, ...]:
    return tuple(
        Weight(name, tensor.shape, experts if "_exps." in name else 1)
        for name, tensor in tensors.items()
    )


def _layer(metadata: _Metadata, index: int, tensors: Mapping[str, Tensor]) -> Layer:
    return Layer(
        mixer=_mixer(metadata, index, tensors),
        feed_forward=_feed_forward(metadata, tensors),
        stored_weights=_weights(tensors, metadata.number("expert_count", 0) or 1),
    )


def _mixer(metadata: _Metadata, index: int, tensors: Mapping[str, Tensor]) -> Mixer | None:
    if "attn_kv_a_mqa.weight" in tensors:
        return _latent_attention(metadata, tensors)
    if "attn_output.weight" in tensors:
        return _attention(metadata, index, tensors)
    if any(name.startswith(("ssm_", "shortconv.")) for name in tensors):
        return _recurrent(metadata, tensors)
    if any(name.startswith("time_mix") for name in tensors):
        raise UnreadArchitecture(f"models of the family {metadata.family} are not known here")
    return None


def _attention(metadata: _Metadata, index: int, tensors: Mapping[str, Tensor]) -> Attention:
    width = tensors["attn_output.weight"].shape[1]
    heads = metadata.of_layer("attention.head_count", index)
    kv_heads = metadata.of_layer("attention.head_count_kv", index, heads)
    window_tokens = metadata.window_tokens(index)
    keys, values = "attention.key_length", "attention.value_length"
    head_width = metadata.number(keys, width // max(heads, 1))
    value_width = metadata.number(values, head_width)
    if window_tokens is not None:  # Gemma 4's heads are narrower where there is a window
        head_width = metadata.number(f"{keys}_swa", head_width)
        value_width = metadata.number(f"{values}_swa", value_width)
    queries = tensors.get("attn_q.weight")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        key_width=head_width,
        value_width=value_width,
        window_tokens=window_tokens,
        is_chunked=metadata.family == "llama4" and window_tokens is not None,
        has_output_gate=queries is not None and queries.shape[1] == 2 * heads * head_width,
        values_are_keys=queries is not None and "attn_v.weight" not in tensors,
    )


def _latent_attention(metadata: _Metadata, tensors: Mapping[str, Tensor]) -> LatentAttention:
    rope_width = metadata.number("rope.dimension_count")
    # Files with a latent cache say a head's own width apart from the cache's.
    key_width = metadata.number(
        "attention.key_length_mla", metadata.number("attention.key_length", 0)
    )
    value_width = metadata.number(
        "attention.value_length_mla", metadata.number("attention.value_length", 0)
    )
    query_rank = metadata.number("attention.q_lora_rank", 0)
    return LatentAttention(
        heads=metadata.number("attention.head_count"),
        query_rank=query_rank if "attn_q_a.weight" in tensors else None,
        kv_rank=metadata.number("attention.kv_lora_rank"),
        nope_width=key_width - rope_width,
        rope_width=rope_width,
        value_width=value_width,
    )


def _recurrent(metadata: _Metadata, tensors: Mapping[str, Tensor]) -> Recurrent:
    width = metadata.number("embedding_length")
    if "shortconv.conv.weight" in tensors:
        kernel = metadata.number("shortconv.l_cache")
        return Recurrent("short_convolution", 0, (kernel - 1) * width, _weights(tensors))
    inner, state = metadata.number("ssm.inner_size"), metadata.number("ssm.state_size")
    kernel, groups = metadata.number("ssm.conv_kernel"), metadata.number("ssm.group_count", 0)
    if "ssm_beta.weight" in tensors or "ssm_ba.weight" in tensors:
        kind = "gated_delta_net"
    else:
        kind = "mamba" if "ssm_x.weight" in tensors else "mamba2"
    return Recurrent(
        kind=kind,
        state_elements=inner * state,
        convolution_elements=(kernel - 1) * (inner + 2 * groups * state),
        weights=_weights({name: each for name, each in tensors.items() if name.startswith("ssm_")}),
    )


def _feed_forward(
    metadata: _Metadata, tensors: Mapping[str, Tensor]
) -> FeedForward | Experts | None:
    down = tensors.get("ffn_down_exps.weight")
    if down is not None:
        # Gemma 4 has a dense network beside its experts.
        shared = tensors.get("ffn_down_shexp.weight") or tensors.get("ffn_down.weight")
        return Experts(
            count=down.shape[2],
            active=metadata.number("expert_used_count"),
            width=down.shape[0],
            shared_width=0 if shared is None else shared.shape[0],
            is_gated=not {"ffn_gate_exps.weight", "ffn_gate_up_exps.weight"}.isdisjoint(tensors),
        )
    down = tensors.get("ffn_down.weight")
    if down is None:
        return None
    inner = down.shape[0]
    up = tensors.get("ffn_up.weight")
    is_fused = up is not None and up.shape[1] == 2 * inner
    return FeedForward(inner, is_gated=is_fused or "ffn_gate.weight" in tensors)
