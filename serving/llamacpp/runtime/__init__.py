"""llama.cpp, as the rest of the engine sees it. The only package of the engine that touches ctypes.

Nothing here is thread-safe except the vocabulary (:meth:`Model.tokenize`, :meth:`Model.piece`); the
scheduler's thread owns the context and the samplers.
"""

import os

# Read when llama.cpp's OpenMP is loaded, below. Its threads wait for each other a thousand times a step;
# by default each burns milliseconds of a core that another program holds up. This lasts from one step to
# the next, and little longer: much faster on a busy machine (docs/results/README.md).
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

from serving.llamacpp.runtime.adapters import LoraAdapter
from serving.llamacpp.runtime.context import Context, KvType
from serving.llamacpp.runtime.embedding import EmbeddingContext, PairFormat, Pooling, pooling_of
from serving.llamacpp.runtime.faults import RuntimeFault
from serving.llamacpp.runtime.model import Model
from serving.llamacpp.runtime.multimodal import (
    Image,
    ImageRows,
    Picture,
    Projector,
    UnfitPicture,
)
from serving.llamacpp.runtime.pages import use_small_pages
from serving.llamacpp.runtime.sampler import Sampler

__all__ = [
    "Context",
    "EmbeddingContext",
    "Image",
    "ImageRows",
    "KvType",
    "LoraAdapter",
    "Model",
    "PairFormat",
    "Picture",
    "Pooling",
    "Projector",
    "RuntimeFault",
    "Sampler",
    "UnfitPicture",
    "pooling_of",
    "use_small_pages",
]
