"""What a vLLM counts about itself: under the names of our own engines' counts, and under its own."""

from __future__ import annotations

from typing import Any

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from serving.engines.vllm.adapters import without_versions

LOAD_PATH = "/metrics"

_PREFIX, _CREATED = "vllm:", "_created"
_NAMES = {
    "vllm:num_requests_running": "running",
    "vllm:prefix_cache_hits_total": "prefix_hit_tokens",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:spec_decode_num_draft_tokens_total": "drafted_tokens",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted_tokens",
}
_WAITING = "vllm:num_requests_waiting"
_KV_USED, _CACHE = "vllm:kv_cache_usage_perc", "vllm:cache_config_info"
# That of the model is ours to tell.
_MODEL_LABELS = ("model_name", "engine")


def load_of(exposition: bytes) -> dict[str, Any]:
    """From its Prometheus series; what it does not tell is not there. ``families`` are all of its own series."""
    counts: dict[str, Any] = {}
    families: list[Metric] = []
    used = 0.0
    for family in text_string_to_metric_families(exposition.decode()):
        if not family.name.startswith(_PREFIX) or family.name.endswith(_CREATED):
            continue
        for sample in family.samples:
            if sample.name in _NAMES:
                name = _NAMES[sample.name]
                counts[name] = counts.get(name, 0.0) + sample.value
            elif sample.name == _WAITING:
                counts["waiting_by_class"] = {"interactive": sample.value}
            elif sample.name == _KV_USED:
                used = sample.value
            elif sample.name == _CACHE:
                counts["kv_total_tokens"] = _tokens(sample.labels)
        families.append(family)
    if (total := counts.get("kv_total_tokens")) is not None:
        counts["kv_used_tokens"] = round(used * total)
    counts["families"] = [_renamed(family) for family in families]
    return counts


def _tokens(labels: dict[str, str]) -> float | None:
    blocks, tokens = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    return float(blocks) * float(tokens) if blocks.isdecimal() and tokens.isdecimal() else None


def _renamed(family: Metric) -> Metric:
    """A family without labels that say whose it is."""
    told = Metric(family.name, family.documentation, family.type)
    told.samples = [
        Sample(
            sample.name,
            {
                name: without_versions(value)
                for name, value in sample.labels.items()
                if name not in _MODEL_LABELS
            },
            sample.value,
        )
        for sample in family.samples
        if not sample.name.endswith(_CREATED)
    ]
    return told
