"""How much memory vLLM takes, and how many tokens its cache then holds.

vLLM takes a share of each card, loads the weights, runs a step of the most tokens to see what that takes, and makes
blocks of a cache of the rest (``vllm/v1/worker/gpu_worker.py``, ``determine_available_memory``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
)
from serving.planner.weights import ModelWeights

BLOCK_TOKENS = 16
_GIB = 2**30
# CUDA's context and libraries, and graphs, as it logs them for one card ("non_torch_memory", "CUDA graph pool").
_NON_TORCH_BYTES = int(0.6 * _GIB)
_ELEMENT_BYTES = 2
# A scale of 16 bits and a zero point of 4 for 128 weights.
_AWQ_BITS = 4 + (16 + 4) / 128
# What its processes take of main memory: Python, PyTorch, and CUDA's libraries.
VLLM_HOST_BYTES = 4 * _GIB
# Of a step, tokens computed at once when nobody says.
DEFAULT_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class VllmMemory:
    """One card's, in bytes: ``cache_blocks`` of :data:`BLOCK_TOKENS` each are what is left for sequences."""

    weights: int
    activations: int
    overhead: int
    cache: int
    cache_blocks: int

    @property
    def cache_tokens(self) -> int:
        """Tokens of all sequences together."""
        return self.cache_blocks * BLOCK_TOKENS


def vllm_memory(
    architecture: Architecture,
    weights_bytes: int,
    card_bytes: int,
    *,
    fraction: float = 0.9,
    step_tokens: int = DEFAULT_STEP_TOKENS,
    tensor_parallel: int = 1,
    cache_element_bytes: int = _ELEMENT_BYTES,
) -> VllmMemory:
    """What one of ``tensor_parallel`` equal cards has; no blocks if the weights leave no room."""
    weights = weights_bytes // tensor_parallel
    activations = activation_bytes(architecture, step_tokens, tensor_parallel)
    left = int(fraction * card_bytes) - weights - activations - _NON_TORCH_BYTES
    blocks = kv_blocks(architecture, max(0, left), tensor_parallel, cache_element_bytes)
    return VllmMemory(weights, activations, _NON_TORCH_BYTES, max(0, left), blocks)


def in_fp8(weights: ModelWeights) -> ModelWeights:
    """16-bit weights whose layers are made FP8 while they are loaded; embeddings and output stay."""
    return _with_layers_in(weights, 8.0)


def in_awq(weights: ModelWeights) -> ModelWeights:
    """16-bit weights whose layers are in 4 bits, as AutoAWQ writes them; embeddings and output stay."""
    return _with_layers_in(weights, _AWQ_BITS)


def _with_layers_in(weights: ModelWeights, bits: float) -> ModelWeights:
    share = bits / (8 * _ELEMENT_BYTES)
    return replace(
        weights,
        layers=tuple(
            replace(
                layer,
                total_bytes=int(layer.total_bytes * share),
                expert_bytes=int(layer.expert_bytes * share),
            )
            for layer in weights.layers
        ),
    )


def activation_bytes(architecture: Architecture, step_tokens: int, tensor_parallel: int = 1) -> int:
    """The peak of a step: a feed-forward network's input, output and halves, and the scores of a token a sequence."""
    per_token = max(_activations(layer, architecture.width) for layer in architecture.layers)
    return step_tokens * per_token * _ELEMENT_BYTES // tensor_parallel


def _activations(layer: Layer, width: int) -> int:
    match layer.feed_forward:
        case FeedForward(width=inner):
            return 3 * width + 3 * inner
        case Experts() as experts:
            return 3 * width + 3 * (experts.active * experts.width + experts.shared_width)
    return 3 * width


def kv_blocks(
    architecture: Architecture,
    cache_bytes: int,
    tensor_parallel: int = 1,
    element_bytes: int = _ELEMENT_BYTES,
) -> int:
    """Blocks that fit into so many bytes of one card; layers with windows count as those without."""
    block_bytes = BLOCK_TOKENS * kv_bytes_per_token(architecture, tensor_parallel, element_bytes)
    return cache_bytes // block_bytes if block_bytes else 0


def kv_bytes_per_token(
    architecture: Architecture, tensor_parallel: int = 1, element_bytes: int = _ELEMENT_BYTES
) -> int:
    """Of one card: heads are shared out as far as there are some; latent vectors are on all cards."""
    elements = 0
    for layer in architecture.layers:
        match layer.mixer:
            case Attention() as attention:
                heads = max(1, attention.kv_heads // tensor_parallel)
                elements += heads * (attention.key_width + attention.value_width)
            case LatentAttention() as attention:
                elements += attention.cache_elements
    return elements * element_bytes
