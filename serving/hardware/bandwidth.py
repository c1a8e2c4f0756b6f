"""How fast this machine's processor reads its memory, measured: what decoding on it is bound by."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from serving.hardware.cpu import physical_cores

# All threads' together; well beyond caches, which would be faster.
_TOTAL_BYTES = 2**29
_SECONDS = 0.3


def read_gb_per_second(seconds: float = _SECONDS) -> float:
    """Has all cores read 512 MiB for about ``seconds``; in 10**9 bytes a second.

    What others do meanwhile takes away from it.
    """
    threads = physical_cores()
    block_bytes = _TOTAL_BYTES // threads // 4 * 4
    blocks = [np.ones(block_bytes // 4, np.int32) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        started = time.monotonic()
        ends = started + seconds
        passes = sum(pool.map(lambda block: _read(block, ends), blocks))
        took = time.monotonic() - started
    return passes * block_bytes / took / 1e9


def _read(block: NDArray[np.int32], ends: float) -> int:
    """Reads a block again and again, at least once; returns how often."""
    passes = 0
    while not passes or time.monotonic() < ends:
        # One instruction for a register full, and NumPy lets other threads run meanwhile.
        block.max()
        passes += 1
    return passes
