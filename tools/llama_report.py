"""What llama.cpp itself says of a model: the memory it takes (``memory``), and the types it quantizes to (``types``).

``python -m tools.llama_report memory FILE`` and ``... types FILE`` read a JSON list, of settings or of mixtures, and
print one of answers. llama.cpp works out what it would allocate and quantize, without doing so: files may be larger
than the memory. A process of its own, since llama.cpp ends it when it does not like a file.
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
_QUANTIZED = re.compile(
    r"\] +(\S+) +- \[.*?\], type = +(\S+), size = .*? MiB(?: -> .*? MiB \((\S+)\))?"
)
_KV_TYPES = {"F16": 1, "Q8_0": 8, "Q4_0": 2}  # of ``enum ggml_type``
_FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(_level: int, text: bytes, _data: Any) -> None:
    _LINES.append(text.decode("utf-8", errors="replace"))


def memory(path: Path, several: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Bytes of weights, cache, intermediate results and scores, as llama.cpp logs them, with each of several settings."""
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        sys.exit("".join(_LINES[-5:]))
    weights = float(llama_cpp.llama_model_size(model))
    found = [{"weights": weights} | _of_context(model, settings) for settings in several]
    llama_cpp.llama_model_free(model)
    return found


def _of_context(model: Any, settings: dict[str, Any]) -> dict[str, float]:
    _LINES.clear()
    context = llama_cpp.llama_init_from_model(model, _context_params(settings))
    if not context:
        sys.exit("".join(_LINES[-5:]))
    found = {
        "cache": _found(_CACHE),
        "compute": _found(_COMPUTE),
        "output": _found(_OUTPUT),
    }
    llama_cpp.llama_free(context)
    return found


def _context_params(settings: dict[str, Any]) -> Any:
    """As rigserve's engine sets them (``serving/llamacpp/runtime/context.py``)."""
    params = llama_cpp.llama_context_default_params()
    slots = settings["slots"]
    params.n_ctx = settings["pool_tokens"] or settings["context_length"] * slots
    params.n_seq_max = slots
    params.n_batch = params.n_ubatch = max(settings["batch_tokens"], slots)
    params.kv_unified = settings["pool_tokens"] is not None
    params.swa_full = settings["has_full_windows"]
    params.type_k = _KV_TYPES[settings["key_type"]]
    params.type_v = _KV_TYPES[settings["value_type"]]
    if not settings["has_flash_attention"]:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def _found(pattern: re.Pattern[str]) -> float:
    return _MIB * sum(float(size) for size in pattern.findall("".join(_LINES)))


def types(path: Path, mixtures: list[str]) -> list[dict[str, str]]:
    """The type that each tensor would have after quantizing to each of some mixtures."""
    return [_types(path, mixture) for mixture in mixtures]


def _types(path: Path, mixture: str) -> dict[str, str]:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[mixture]
    params.dry_run = True
    _LINES.clear()
    if llama_cpp.llama_model_quantize(str(path).encode(), b"", ctypes.byref(params)):
        sys.exit("".join(_LINES[-5:]))
    found = _QUANTIZED.findall("".join(_LINES))
    return {name: (new or old).upper() for name, old, new in found}


def main(what: str, path: str) -> None:
    """Print what was asked for."""
    llama_cpp.llama_log_set(_on_log, ctypes.c_void_p(0))
    answer = (memory if what == "memory" else types)(Path(path), json.load(sys.stdin))
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
