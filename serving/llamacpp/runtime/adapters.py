"""LoRA adapters: small weights that change what a model's large ones do."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import llama_cpp

from serving.llamacpp.runtime.faults import fault
from serving.llamacpp.runtime.model import Model


class LoraAdapter:
    """An adapter's weights in memory beside its model's, and the ``scale`` at which they count.

    Made and closed while no batch is decoded: llama.cpp lists a model's adapters without a lock.
    Compared by identity: what was computed with one says nothing of another, also of the same name.
    """

    def __init__(self, model: Model, path: Path, scale: float) -> None:
        """Load a GGUF file that has been checked: of some faults llama.cpp would end the process.

        Raises :class:`RuntimeFault`.
        """
        handle = llama_cpp.llama_adapter_lora_init(model.handle, os.fsencode(path))
        if not handle:
            raise fault(f"cannot load the adapter {path}")
        self.handle = handle
        self.scale = scale

    def close(self) -> None:
        """Free the weights. No context may use them any more."""
        llama_cpp.llama_adapter_lora_free(self.handle)


def use_adapter(context: llama_cpp.llama_context_p, adapter: LoraAdapter | None) -> None:
    """Apply an adapter, or none, to every row of the batches that follow.

    A change makes llama.cpp plan its compute anew before the next batch, which costs about as much
    as a decode of one row; the same again costs nothing.
    """
    if adapter is None:
        llama_cpp.llama_set_adapters_lora(context, None, 0, None)
        return
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter.handle)
    llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(adapter.scale))
