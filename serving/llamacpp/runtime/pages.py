"""Huge pages: for what lives long, and for nothing else."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_THP_DISABLE = 41


def use_small_pages() -> None:
    """Have the system give this process no more huge pages; it keeps those it has.

    They are worth it for weights and KV cells. What comes and goes would wait milliseconds for each to be zeroed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
