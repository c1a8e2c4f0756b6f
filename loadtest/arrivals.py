"""When requests are due that do not wait for each other."""

from __future__ import annotations

import random
from collections.abc import Iterator


def arrival_times(
    arrivals: str, requests_per_second: float, burstiness: float, rng: random.Random
) -> Iterator[float]:
    """Seconds from the start, without end.

    ``constant`` is evenly spaced. ``poisson`` has exponential gaps; ``gamma`` has gamma gaps of the shape
    ``burstiness`` and the same mean, so that their variance is the mean squared over it (as in BurstGPT's
    model, arXiv 2401.17644, and `vllm bench serve --burstiness`).
    """
    mean_gap = 1 / requests_per_second
    at = 0.0
    while True:
        if arrivals == "constant":
            yield at
            at += mean_gap
            continue
        shape = burstiness if arrivals == "gamma" else 1.0
        at += rng.gammavariate(shape, mean_gap / shape)
        yield at
