"""What a llama-server counts about itself, under the names of our own engines' counts."""

from __future__ import annotations

LOAD_PATH = "/metrics"

_NAMES = {
    "llamacpp:requests_processing": "running",
    "llamacpp:prompt_tokens_cached_total": "prefix_hit_tokens",
    "llamacpp:spec_decode_num_draft_tokens_total": "drafted_tokens",
    "llamacpp:spec_decode_num_accepted_tokens_total": "accepted_tokens",
}


def load_of(exposition: bytes) -> dict[str, float]:
    """From its Prometheus series; what it does not tell is not there."""
    counts = {}
    for line in exposition.decode().splitlines():
        name, _, value = line.partition(" ")
        if name in _NAMES:
            counts[_NAMES[name]] = float(value)
    return counts
