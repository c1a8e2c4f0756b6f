"""How many bytes weights take: the type that llama.cpp gives to each tensor, by the name of a mixture.

A mixture such as ``Q4_K_M`` is not one type. Which tensor has which follows the rules of
``llama_tensor_get_type`` in llama.cpp's ``src/llama-quant.cpp`` (without an importance matrix).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    LatentAttention,
    Recurrent,
    Weight,
)

# Of each type: numbers in a block, and bytes of it (``ggml-common.h``).
BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F32": (1, 4),
        "F16": (1, 2),
        "BF16": (1, 2),
        "Q8_0": (32, 34),
        "Q6_K": (256, 210),
        "Q5_K": (256, 176),
        "Q5_1": (32, 24),
        "Q5_0": (32, 22),
        "Q4_K": (256, 144),
        "Q4_1": (32, 20),
        "Q4_0": (32, 18),
        "IQ4_NL": (32, 18),
        "IQ4_XS": (256, 136),
        "MXFP4": (32, 17),
        "Q3_K": (256, 110),
        "Q2_K": (256, 84),
    }
)

# What most tensors of a mixture have.
_MAIN_TYPES = {
    **{name: name for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0")},
    **{name: name for name in ("Q2_K", "IQ4_NL", "IQ4_XS")},
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "MXFP4_MOE": "MXFP4",
}  # fmt: skip
MIXTURES = tuple(_MAIN_TYPES)
"""The names of mixtures whose rules are known here."""

_NOT_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ssm_conv1d|shortconv\.conv\.weight|altup|laurel|per_layer_model_proj"
    r"|attn_rel_b\.weight|position_embd|token_types|time_mix_(first|w\d|v\d|a\d|g\d|decay_w\d|lerp_fused)\.weight"
)
_LAYER = re.compile(r"blk\.(\d+)\.")
# Where a row is no multiple of 256 numbers.
_FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# By family: weights that its files have in one tensor, in the order in which they come, and its name.
_STORED_TOGETHER: Mapping[str, Mapping[tuple[str, ...], str]] = {
    "phi3": {("attn_q", "attn_k", "attn_v"): "attn_qkv", ("ffn_gate", "ffn_up"): "ffn_up"},
    "glm4": {("ffn_gate", "ffn_up"): "ffn_up"},
    "qwen3next": {("ssm_beta", "ssm_alpha"): "ssm_ba"},
}
_UNQUANTIZED = ("F32", "F16", "BF16")
_MANY_EXPERTS_ATTENTION = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")


def row_bytes(kind: str, elements: int) -> int:
    """The bytes that ``elements`` numbers take in a type: whole blocks."""
    per_block, block_bytes = BLOCKS[kind]
    return -(-elements // per_block) * block_bytes


def weight_bytes(weight: Weight, kind: str) -> int:
    """The bytes of a tensor in a type."""
    return row_bytes(kind, weight.shape[0]) * (weight.elements // weight.shape[0])


def stored_weights(architecture: Architecture) -> Iterator[Weight]:
    """The weights as they stand in a GGUF file, where some families have several in one tensor."""
    groups = _STORED_TOGETHER.get(architecture.family, {})
    rows: dict[str, int] = {}
    for weight in architecture.weights():
        layer, _, part = weight.name.removesuffix(".weight").rpartition(".")
        group = next((group for group in groups if part in group), None)
        if group is None:
            yield weight
            continue
        name = f"{layer}.{groups[group]}.weight"
        rows[name] = rows.get(name, 0) + weight.shape[1]
        if part == group[-1]:
            yield Weight(name, (weight.shape[0], rows[name]))


def types_of(architecture: Architecture, mixture: str) -> dict[str, str]:
    """The type of every weight, by its name, in a model that is quantized to ``mixture``.

    Raises KeyError for a mixture that is not among :data:`MIXTURES`.
    """
    weights = sorted(stored_weights(architecture), key=lambda weight: _layer_of(weight.name))
    rules = _Rules.of(architecture, mixture, weights)
    return {weight.name: rules.choose(weight) for weight in weights}


@dataclass(slots=True)
class _Rules:
    """Walks the tensors in their order in a file, as some choices depend on how many came before."""

    mixture: str
    main_type: str
    layers: int
    queries_per_key: int
    experts: int
    is_70b: bool
    has_tied_embeddings: bool
    values: int
    values_seen: int = 0
    downs_seen: int = 0

    @classmethod
    def of(cls, architecture: Architecture, mixture: str, weights: Iterable[Weight]) -> _Rules:
        experts = next(
            (
                layer.feed_forward.count
                for layer in architecture.layers
                if isinstance(layer.feed_forward, Experts)
            ),
            0,
        )
        layers = len(architecture.layers)
        queries_per_key = _queries_per_key(architecture)
        return cls(
            mixture=mixture,
            main_type=_MAIN_TYPES[mixture],
            layers=layers,
            queries_per_key=queries_per_key,
            experts=experts,
            is_70b=layers == 80
            and (
                architecture.family == "qwen2"
                or (architecture.family == "llama" and experts == 0 and queries_per_key > 1)
            ),
            has_tied_embeddings=architecture.has_tied_embeddings,
            values=sum(_is_value(weight.name) for weight in weights),
        )

    def choose(self, weight: Weight) -> str:
        if not _may_be_quantized(weight):
            return "F32"
        if self.main_type in _UNQUANTIZED:
            return self.main_type
        return _fitting(self._kind(weight.name, weight), weight.shape[0])

    def _kind(self, name: str, weight: Weight) -> str:
        mixture = self.mixture
        is_embedding = name in ("token_embd.weight", "per_layer_token_embd.weight")
        if name == "output.weight" or (self.has_tied_embeddings and is_embedding):
            if mixture == "MXFP4_MOE" or weight.shape[0] % BLOCKS[self.main_type][0]:
                return "Q8_0"
            return self.main_type if self.main_type == "Q8_0" else "Q6_K"
        if mixture == "MXFP4_MOE":
            return "MXFP4" if len(weight.shape) > 2 else "Q8_0"
        if is_embedding:
            return self.main_type
        if _is_value(name):
            return self._value_kind()
        if "attn_k.weight" in name:
            return "Q8_0" if self.experts == 8 else self.main_type
        if "ffn_down" in name:
            return self._down_kind(name)
        if "attn_output.weight" in name:
            if self.experts == 8:
                return "Q5_K" if mixture in _MANY_EXPERTS_ATTENTION else self.main_type
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mixture, self.main_type)
        return self.main_type

    def _value_kind(self) -> str:
        mixture, seen = self.mixture, self.values_seen
        self.values_seen += 1
        kind = self.main_type
        has_shared_keys = self.queries_per_key >= 4
        if mixture == "Q2_K":
            kind = "Q4_K" if has_shared_keys else "Q3_K"
        elif mixture == "Q3_K_M":
            kind = "Q5_K" if seen < 2 else "Q4_K"
        elif mixture == "Q3_K_L" or (mixture in ("IQ4_NL", "IQ4_XS") and has_shared_keys):
            kind = "Q5_K"
        elif mixture in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(seen, self.values):
            kind = "Q6_K"
        elif mixture == "Q4_K_S" and seen < 4:
            kind = "Q5_K"
        if self.is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if self.experts == 8 else kind

    def _down_kind(self, name: str) -> str:
        layer = _layer_of(name) if self.experts > 1 else self.downs_seen
        self.downs_seen += 1
        mixture, is_early = self.mixture, layer < self.layers // 8
        if mixture == "Q2_K":
            return "Q3_K"
        if mixture == "Q3_K_M":
            return "Q5_K" if layer < self.layers // 16 else "Q4_K"
        if mixture == "Q3_K_L" or (mixture in ("IQ4_NL", "IQ4_XS", "Q4_K_S") and is_early):
            return "Q5_K"
        if mixture in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(layer, self.layers):
            return "Q6_K"
        return self.main_type


def _gets_more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _layer_of(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _may_be_quantized(weight: Weight) -> bool:
    dimensions = len(weight.shape) - next(
        (at for at, size in enumerate(reversed(weight.shape)) if size > 1), 0
    )
    return (
        dimensions > 1
        and weight.name.endswith("weight")
        and _NOT_QUANTIZED.search(weight.name) is None
    )


def _fitting(kind: str, row: int) -> str:
    if row % BLOCKS[kind][0] == 0:
        return kind
    kind = _FALLBACKS.get(kind, kind)
    return kind if row % BLOCKS[kind][0] == 0 else "F16"


def _queries_per_key(architecture: Architecture) -> int:
    """As llama.cpp reads it of the first layer; its files of gated delta nets state it of all layers."""
    for layer in architecture.layers:
        match layer.mixer:
            case Attention(heads=heads, kv_heads=kv_heads):
                return heads // kv_heads
            case LatentAttention(heads=heads):
                return heads  # it counts one head of keys
            case Recurrent(kind="gated_delta_net"):
                continue
        return 0
    return 0
