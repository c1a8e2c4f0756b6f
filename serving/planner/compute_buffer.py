"""The memory of llama.cpp's intermediate results: what of a step's graph is alive at the same time, at most.

llama.cpp reserves it for a batch of the most tokens whose every row is scored. Each stage below is where one part of
the graph peaks; their sizes were read off ggml's allocator and are held to it in ``docs/results/memory.md``.
"""

from __future__ import annotations

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Recurrent,
)
from serving.planner.settings import Settings

_FLOAT_BYTES = 4
_MASK_BYTES = 2  # F16 with flash attention, else a float
_OPERAND_BYTES = 2  # F16, BF16; beside quantized weights about one
# What some families leave beside the scores, where the allocator finds no hole for it: widths of the model, and others.
_BESIDE_SCORES = {
    "phi3": (2, 0),
    "llama4": (2, 0),
    "glm4moe": (1, 0),
    "nemotron_h_moe": (2, 0),
    "deepseek2": (0, 16384),
    "qwen3next": (0, 16384),
}
# Of the states of all slots, while a recurrent layer works.
_STATE_COPIES = {"gated_delta_net": 2, "mamba2": 1, "short_convolution": 1}
# What the allocator loses between blocks of unlike sizes.
_FRAGMENTATION = 1.05


def compute_bytes(
    architecture: Architecture, settings: Settings, *, has_output: bool = True
) -> int:
    """The bytes of a step's intermediate results on a device that has all layers, or some without the output."""
    tokens = settings.step_tokens
    masks = _mask_floats(architecture, settings)
    stages = [_layer_floats(layer, architecture.width, settings) for layer in architecture.layers]
    floats = max(stages, default=0.0) + masks
    if has_output and not settings.is_pooled:
        floats = max(floats, _scoring_floats(architecture, masks, floats))
    return int(_FRAGMENTATION * _FLOAT_BYTES * floats * tokens)


def output_bytes(architecture: Architecture, settings: Settings) -> int:
    """What the scores of a step's rows are copied to, in main memory."""
    return _FLOAT_BYTES * architecture.vocabulary * settings.output_rows


def operand_bytes(architecture: Architecture, settings: Settings) -> int:
    """What a processor multiplies by, once more: brought into the type that a kernel takes beside its left side's.

    ggml keeps it for the largest product of a step (``ggml_graph_plan``'s ``work_size``), and does not log it.
    """
    most = max(
        (_operand_floats(layer, architecture.width, settings) for layer in architecture.layers),
        default=0,
    )
    return _OPERAND_BYTES * most * settings.step_tokens


def _operand_floats(layer: Layer, width: int, settings: Settings) -> int:
    """Numbers for each token of a step in a layer's largest right side."""
    widest = width
    match layer.feed_forward:
        case FeedForward(width=inner):
            widest = max(widest, inner)
        case Experts() as experts:
            widest = max(widest, experts.active * max(experts.width, width), experts.shared_width)
    match layer.mixer:
        case Attention() as attention:
            widest = max(widest, attention.heads * max(attention.key_width, attention.value_width))
            if not settings.has_flash_attention:
                widest = max(widest, attention.heads * settings.cells_of(attention.window_tokens))
        case LatentAttention() as attention:
            widest = max(widest, attention.heads * attention.cache_elements)
            if not settings.has_flash_attention:
                widest = max(widest, attention.heads * settings.cells)
        case Recurrent() as recurrent:
            widest = max(widest, *(weight.shape[0] for weight in recurrent.weights))
    return widest


def _scoring_floats(architecture: Architecture, masks: float, before: float) -> float:
    """Numbers for each token while all tokens are scored, where the layers have taken ``before`` of them."""
    width = architecture.width
    floats = architecture.vocabulary + 2.0 * width
    if floats > before and architecture.family in _BESIDE_SCORES:
        widths, others = _BESIDE_SCORES[architecture.family]
        floats += widths * width + others + (masks if masks <= width else 0.0)
    return floats


def input_bytes(architecture: Architecture, settings: Settings) -> int:
    """What main memory holds of a step whose layers are on cards: embeddings and masks."""
    floats = architecture.width + _mask_floats(architecture, settings)
    return int(_FLOAT_BYTES * floats * settings.step_tokens)


def _layer_floats(layer: Layer, width: int, settings: Settings) -> float:
    """Numbers for each token of a step, at the peak of a layer, without masks."""
    return max(_mixer_floats(layer, width, settings), _feed_forward_floats(layer, width))


def _mixer_floats(layer: Layer, width: int, settings: Settings) -> float:
    match layer.mixer:
        case Attention() as attention:
            queries = attention.heads * max(attention.key_width, attention.value_width)
            keys = attention.kv_heads * (attention.key_width + attention.value_width)
            gate = queries if attention.has_output_gate else 0
            floats = 3.0 * width + 2 * queries + keys + 2 * gate
            if not settings.has_flash_attention:
                cells = settings.cells_of(attention.window_tokens)
                floats += width + attention.heads * cells
            return floats
        case LatentAttention() as attention:
            absorbed = attention.heads * attention.cache_elements
            plain = attention.heads * (attention.nope_width + attention.rope_width)
            floats = 3.0 * width + 2 * absorbed + 2 * plain
            if not settings.has_flash_attention:
                cells = settings.cells
                floats += attention.heads * cells
                # The latent vectors of all cells, turned over, in F16.
                copied = cells * settings.streams * attention.kv_rank
                floats += copied * _MASK_BYTES / _FLOAT_BYTES / settings.step_tokens
            return floats
        case Recurrent() as recurrent:
            widest = max(each.shape[1] for each in recurrent.weights if len(each.shape) > 1)
            states = recurrent.state_elements + recurrent.convolution_elements
            return (
                3 * width
                + 3 * widest
                + _STATE_COPIES.get(recurrent.kind, 2)
                * states
                * settings.slots
                / settings.step_tokens
            )
    return 0.0


def _feed_forward_floats(layer: Layer, width: int) -> float:
    match layer.feed_forward:
        case FeedForward(width=inner):
            return 4 * width + 3 * inner
        case Experts() as experts:
            inner, outer = experts.active * experts.width, experts.active * width
            routed = 4 * width + max(3 * inner, inner + 2 * outer) + 3 * experts.count
            return max(routed, 5 * width + 3 * experts.shared_width)
    return 0.0


def _mask_floats(architecture: Architecture, settings: Settings) -> float:
    """Who sees whom: one mask for each reach of attention that the model has."""
    reaches = {
        layer.mixer.window_tokens if isinstance(layer.mixer, Attention) else None
        for layer in architecture.layers
        if isinstance(layer.mixer, Attention | LatentAttention)
    }
    cells = sum(settings.cells_of(reach) for reach in reaches)
    return cells * (_MASK_BYTES if settings.has_flash_attention else _FLOAT_BYTES) / _FLOAT_BYTES
