"""llama.cpp's log, and faults that carry its last words."""

from __future__ import annotations

import ctypes
import logging
import re
from collections import Counter

import llama_cpp

_log = logging.getLogger("llama.cpp")
_ERROR_LEVEL, _WARNING_LEVEL, _CONTINUED_LEVEL = 4, 3, 5
_recent_errors: list[str] = []

# Bytes of each device's buffers that llama.cpp has said it took for weights, in this process's life.
weight_buffers_bytes: Counter[str] = Counter()
_WEIGHT_BUFFER = re.compile(r"(\S+) model buffer size = +([\d.]+) MiB")


class RuntimeFault(Exception):
    """llama.cpp refused or failed; the message holds its own last words."""


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def on_log(level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    line = text.decode("utf-8", errors="replace").strip()
    if not line or level == _CONTINUED_LEVEL:
        return
    if level >= _ERROR_LEVEL:
        _recent_errors.append(line)
        del _recent_errors[:-5]
        _log.error("%s", line)
    elif level == _WARNING_LEVEL:
        _log.debug("%s", line)
    elif found := _WEIGHT_BUFFER.search(line):
        weight_buffers_bytes[found[1]] += round(float(found[2]) * 2**20)


def fault(what: str) -> RuntimeFault:
    """A fault with what llama.cpp last logged."""
    details = "; ".join(_recent_errors) or "llama.cpp gave no reason"
    return RuntimeFault(f"{what}: {details}")
