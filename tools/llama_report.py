"""``python -m tools.llama_report FILE < SETTINGS``: what memory llama.cpp itself says that a model takes.

Its own "no_alloc" mode works out what it would allocate, without doing so: files may be larger than the memory.
A process of its own, since llama.cpp ends it when it does not like a file.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp

_LINES: list[str] = []
_MIB = 2**20
_CACHE = re.compile(r"llama_(?:kv_cache|memory_recurrent): size = +([\d.]+) MiB")
_COMPUTE = re.compile(r"compute buffer size = +([\d.]+) MiB")
_OUTPUT = re.compile(r"output buffer size = +([\d.]+) MiB")
_TYPES = {"F16": 1, "Q8_0": 8, "Q4_0": 2}  # of ``enum ggml_type``


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(_level: int, text: bytes, _data: Any) -> None:
    _LINES.append(text.decode("utf-8", errors="replace"))


def report(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Bytes of weights, cache, intermediate results and scores, as llama.cpp logs them."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
    model = _load(path)
    _LINES.clear()
    context = llama_cpp.llama_init_from_model(model, _context_params(settings))
    if not context:
        sys.exit("".join(_LINES[-5:]))
    found = {
        "weights": float(llama_cpp.llama_model_size(model)),
        "cache": _found(_CACHE),
        "compute": _found(_COMPUTE),
        "output": _found(_OUTPUT),
    }
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return found


def _load(path: Path) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        sys.exit("".join(_LINES[-5:]))
    return model


def _context_params(settings: dict[str, Any]) -> Any:
    """As rigserve's engine sets them (``serving/llamacpp/runtime/context.py``)."""
    params = llama_cpp.llama_context_default_params()
    slots = settings["slots"]
    params.n_ctx = settings["pool_tokens"] or settings["context_length"] * slots
    params.n_seq_max = slots
    params.n_batch = params.n_ubatch = max(settings["batch_tokens"], slots)
    params.kv_unified = settings["pool_tokens"] is not None
    params.swa_full = settings["has_full_windows"]
    params.type_k = _TYPES[settings["key_type"]]
    params.type_v = _TYPES[settings["value_type"]]
    if not settings["has_flash_attention"]:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def _found(pattern: re.Pattern[str]) -> float:
    return _MIB * sum(float(size) for size in pattern.findall("".join(_LINES)))


if __name__ == "__main__":
    print(json.dumps(report(Path(sys.argv[1]), json.load(sys.stdin))))
