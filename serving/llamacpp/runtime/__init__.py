"""llama.cpp, as the rest of the engine sees it. The only package of the engine that touches ctypes.

Nothing here is thread-safe except the vocabulary (:meth:`Model.tokenize`, :meth:`Model.piece`); the
scheduler's thread owns the context and the samplers.
"""

from serving.llamacpp.runtime.adapters import LoraAdapter
from serving.llamacpp.runtime.context import Context
from serving.llamacpp.runtime.embedding import EmbeddingContext, PairFormat, Pooling, pooling_of
from serving.llamacpp.runtime.faults import RuntimeFault
from serving.llamacpp.runtime.model import Model
from serving.llamacpp.runtime.sampler import Sampler

__all__ = [
    "Context",
    "EmbeddingContext",
    "LoraAdapter",
    "Model",
    "PairFormat",
    "Pooling",
    "RuntimeFault",
    "Sampler",
    "pooling_of",
]
