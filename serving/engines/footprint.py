"""How much memory a llama.cpp engine will take, estimated from its files before it runs.

The estimate is meant to be too high rather than too low: a model that is let in and does not fit ends others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from serving.config import GgufModel
from serving.engines.launch import Files, Footprint
from serving.models.gguf import Header, read_header

MIB = 2**20

# An engine's process before it has a model: Python (of ours), its libraries, tables of the vocabulary.
_PROCESS_BYTES = 128 * MIB
# What CUDA keeps on a card for each process, and the memory the process keeps for it.
_CUDA_CONTEXT_BYTES = 512 * MIB
# Images on their way through a projector.
_PROJECTOR_WORK_BYTES = 512 * MIB
_KV_BYTES = 2  # F16
_FLOAT_BYTES = 4
_DRAFT_BATCH_TOKENS = 512
# Activations that are alive together in a layer, as multiples of its width and of its feed-forward width.
_WIDTHS, _FEED_FORWARD_WIDTHS = 8, 3


def of_gguf(model: GgufModel, files: Files, *, on_gpu: bool) -> Footprint:
    """An upper estimate for a model that ``files`` hold; ``memory_mib`` of the config overrules it.

    Reads the files' headers; raises ``GgufError`` and OSError.
    """
    header = read_header(files.model)
    shape = _Shape.of(header)
    total_bytes = files.model.stat().st_size + _state_bytes(shape, model)
    rows = max(model.max_batch_tokens, model.max_sequences)
    work_bytes = shape.work_bytes(rows, model.context_length)
    total_bytes += work_bytes
    for adapter in files.adapters.values():
        total_bytes += adapter.path.stat().st_size
    if files.projector is not None:
        total_bytes += files.projector.stat().st_size + _PROJECTOR_WORK_BYTES
    if files.draft_model is not None:
        draft = _Shape.of(read_header(files.draft_model))
        total_bytes += files.draft_model.stat().st_size
        total_bytes += draft.kv_bytes(model.context_length)
        total_bytes += draft.work_bytes(_DRAFT_BATCH_TOKENS, model.context_length)
    host_bytes = _PROCESS_BYTES
    gpu_bytes = 0.0
    # The layer after the last block counts as one.
    share = 1.0 if model.gpu_layers < 0 else min(1.0, model.gpu_layers / (shape.layers + 1))
    if on_gpu and share > 0:
        gpu_bytes = share * total_bytes + _CUDA_CONTEXT_BYTES
        host_bytes += _CUDA_CONTEXT_BYTES
        total_bytes = int((1 - share) * total_bytes)
    host_mib = _mib(host_bytes + total_bytes) + model.prefix_cache_mib
    # Buffers are taken when they are first filled.
    growth_mib = _mib((1 - share if on_gpu else 1) * work_bytes) + model.prefix_cache_mib
    found = Footprint(host_mib, _mib(gpu_bytes), growth_mib)
    if model.memory_mib is None:
        return found
    if found.gpu_mib:
        return replace(found, gpu_mib=model.memory_mib, source="configured")
    return replace(found, host_mib=model.memory_mib, source="configured")


@dataclass(frozen=True, slots=True)
class _Shape:
    """What of a model's header decides its memory beside the weights."""

    layers: int
    width: int
    feed_forward: int
    vocabulary: int
    kv_row_elements: int
    state_elements: int
    attention_heads: int
    is_pooled: bool

    @classmethod
    def of(cls, header: Header) -> _Shape:
        architecture = header.text("general.architecture") or ""

        def number(key: str, default: int = 0) -> int:
            value = header.integer(f"{architecture}.{key}")
            return default if value is None else value

        width, heads = number("embedding_length"), number("attention.head_count", 1)
        # Models whose layers differ have lists here, which the reader skips: as many as heads then.
        kv_heads = number("attention.head_count_kv", heads)
        head_width = width // max(heads, 1)
        keys, values = (
            number("attention.key_length", head_width),
            number("attention.value_length", head_width),
        )
        recurrent = number("ssm.inner_size") * (
            number("ssm.state_size") + number("ssm.conv_kernel")
        )
        embeddings = header.tensors.get("token_embd.weight")
        return cls(
            layers=number("block_count"),
            width=width,
            feed_forward=number("feed_forward_length", 4 * width),
            vocabulary=embeddings.shape[-1] if embeddings else 0,
            kv_row_elements=kv_heads * (keys + values),
            state_elements=recurrent,
            attention_heads=heads,
            is_pooled=header.integer(f"{architecture}.pooling_type") is not None,
        )

    def kv_bytes(self, cells: int) -> int:
        return self.layers * cells * self.kv_row_elements * _KV_BYTES

    def work_bytes(self, rows: int, context_length: int) -> int:
        """Buffers of a batch: activations, the attention's mask, and the scores of all tokens."""
        if self.is_pooled:
            # All of a text at once, every token looking at every other.
            rows = max(rows, context_length)
            scores = self.attention_heads * rows
        else:
            scores = self.vocabulary
        activations = _WIDTHS * self.width + _FEED_FORWARD_WIDTHS * self.feed_forward
        return rows * (activations + scores + 2 * context_length) * _FLOAT_BYTES


def _state_bytes(shape: _Shape, model: GgufModel) -> int:
    if shape.is_pooled:
        return shape.kv_bytes(max(model.max_batch_tokens, model.context_length))
    states = shape.layers * shape.state_elements * _FLOAT_BYTES * model.max_sequences
    outputs = shape.vocabulary * _FLOAT_BYTES * model.max_sequences
    return shape.kv_bytes(model.kv_cells) + states + outputs


def _mib(size_bytes: float) -> int:
    return int(-(-size_bytes // MIB))
