"""vLLM's command line, and what it has in its environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.config import VllmModel
from serving.engines.launch import environment_of
from serving.engines.vllm.adapters import rank_of, slots_of
from serving.engines.vllm.environment import INSIDE
from serving.engines.vllm.families import parsers_of
from serving.hardware.cpu import physical_cores
from serving.models.huggingface import HUB, Description

# The `vllm` command asks for a distribution named vllm, which the build for CPUs is not.
MODULE = "vllm.entrypoints.openai.api_server"
# Less of the main memory than of a card's is vLLM's to take.
GPU_FRACTION, HOST_FRACTION = 0.9, 0.5
# Room for prompts that are being computed, beside what sequences hold: a block for each.
_BLOCK_TOKENS = 128
_MOST_IN_MEMORY = 256
_ONE_BYTE = ("fp8", "fp8_e4m3", "fp8_e5m2")
_AUTO = "auto"


def kv_cache_bytes(model: VllmModel, description: Description) -> int | None:
    """KV cache for all that may run at a time; None where it is as large as a share of the memory leaves it."""
    elements = description.kv_elements_per_token
    if model.memory_fraction is not None or model.context_length == _AUTO or elements is None:
        return None
    # One block is set aside, and each sequence fills its last one only in part.
    tokens = model.max_sequences * (int(model.context_length) + _BLOCK_TOKENS) + _BLOCK_TOKENS
    return tokens * elements * _kv_element_bytes(model, description)


def _kv_element_bytes(model: VllmModel, description: Description) -> int:
    if model.kv_cache_dtype in _ONE_BYTE:
        return 1
    return _element_bytes(model, description) if model.kv_cache_dtype == _AUTO else 2


def _element_bytes(model: VllmModel, description: Description) -> int:
    is_wide = model.dtype == "float32" or (model.dtype == _AUTO and description.is_float32)
    return 4 if is_wide else 2


def lora_bytes(model: VllmModel, description: Description, *, on_gpu: bool) -> int:
    """What is set aside for adapters: each slot has room for the highest rank in all layers. Raises :class:`ModelError`."""
    slots = _lora_slots(model, on_gpu=on_gpu)
    elements = description.lora_elements * _element_bytes(model, description)
    return slots * rank_of(model) * elements if slots else 0


def fraction_of(model: VllmModel, *, on_gpu: bool) -> float:
    """The share of the memory that it takes where its KV cache has no size of its own."""
    return model.memory_fraction or (GPU_FRACTION if on_gpu else HOST_FRACTION)


def arguments(
    model: VllmModel,
    served: Path,
    description: Description,
    adapters: Mapping[str, Path],
    *,
    rank: int,
    port: int,
    host: str,
    on_gpu: bool,
) -> list[str]:
    """What follows the module's name. ``adapters`` are by vLLM's names for them; ``rank`` is the highest that may come."""
    flags: dict[str, object] = {
        "--model": served,
        "--served-model-name": model.served_name,
        "--host": host,
        "--port": port,
        "--max-model-len": model.context_length,
        "--max-num-seqs": model.max_sequences,
        "--dtype": model.dtype,
        "--kv-cache-dtype": model.kv_cache_dtype,
        # What requests leave open is as OpenAI has it, and not as the model's makers like it.
        "--generation-config": "vllm",
    }
    kv_bytes = kv_cache_bytes(model, description)
    if kv_bytes is None:
        flags["--gpu-memory-utilization"] = fraction_of(model, on_gpu=on_gpu)
    else:
        flags["--kv-cache-memory-bytes"] = -(-kv_bytes // model.cards)
    if on_gpu:
        flags["--tensor-parallel-size"] = model.tensor_parallel
        flags["--pipeline-parallel-size"] = model.pipeline_parallel
    if model.over_nodes:
        flags["--distributed-executor-backend"] = "ray"
    optional = {
        "--quantization": model.quantization,
        "--max-num-batched-tokens": model.max_batch_tokens,
        "--chat-template": model.chat_template,
        "--speculative-config": _speculation(model),
    }
    flags |= {flag: value for flag, value in optional.items() if value is not None}
    words = [str(word) for flag in flags.items() for word in flag]
    words += [
        # Each is around those before it.
        *(
            "--middleware",
            "rigserve_inside.AdaptersLeave",
            "--middleware",
            "rigserve_inside.KeyForAll",
        ),
        *("--enable-prompt-tokens-details", "--enable-per-request-metrics"),
        *("--enable-tokenizer-info-endpoint", "--disable-uvicorn-access-log"),
    ]
    if not model.prefix_caching:
        # By itself it is on for models that can have it; others would not start if they were told to.
        words.append("--no-enable-prefix-caching")
    if model.chunked_prefill is not None:
        words.append(
            "--enable-chunked-prefill" if model.chunked_prefill else "--no-enable-chunked-prefill"
        )
    if model.sleep and on_gpu:
        words.append("--enable-sleep-mode")
    words += _parsers(model, description)
    words += _adapters(model, adapters, rank, on_gpu=on_gpu)
    return [*words, *model.extra_args]


def environment(
    model: VllmModel, api_key: str, gpus: tuple[str, ...] | None, *, on_gpu: bool
) -> dict[str, str]:
    """Its environment variables; its key is among them, where other users do not see it."""
    told = {
        "VLLM_API_KEY": api_key,
        "PYTHONPATH": str(INSIDE),
        # Prompts are nobody's business, nor how many there are.
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Adapters come and go by way of the gateway, which has the key.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        # Its workers fork processes that hold the log's pipe.
        "PYTHONUNBUFFERED": "1",
        **environment_of(gpus),
    }
    if not model.over_nodes:
        # Where its own processes meet. It would find out the machine's address by the way to one far away, and listen there.
        told["VLLM_HOST_IP"] = os.environ.get("VLLM_HOST_IP", "127.0.0.1")
    if model.speculation is None or not (model.speculation.model or "").startswith(HUB):
        # All that it reads is here. What the operator has set counts, for files that extra_args name.
        told["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    if model.sleep and on_gpu:
        # Otherwise it has no such calls. What else it then has asks for the key, too.
        told["VLLM_SERVER_DEV_MODE"] = "1"
    if not on_gpu:
        cores = model.threads or physical_cores()
        # It would keep a core for itself of what it finds, and bind its threads to the others.
        told |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cores)}
    return told


def _speculation(model: VllmModel) -> str | None:
    wanted = model.speculation
    if wanted is None:
        return None
    told: dict[str, object] = {"method": wanted.method, "num_speculative_tokens": wanted.tokens}
    if wanted.model is not None:
        told["model"] = wanted.model.removeprefix(HUB)
    return json.dumps(told)


def _parsers(model: VllmModel, description: Description) -> list[str]:
    template = description.template
    if model.chat_template is not None:
        template = Path(model.chat_template).read_text(encoding="utf-8")
    found = parsers_of(description.model_type, template)
    tools = found.tools if model.tool_parser == _AUTO else model.tool_parser
    reasoning = found.reasoning if model.reasoning_parser == _AUTO else model.reasoning_parser
    words = [] if tools is None else ["--enable-auto-tool-choice", "--tool-call-parser", tools]
    return words if reasoning is None else [*words, "--reasoning-parser", reasoning]


def _adapters(
    model: VllmModel, adapters: Mapping[str, Path], rank: int, *, on_gpu: bool
) -> Sequence[str]:
    slots = _lora_slots(model, on_gpu=on_gpu)
    if not slots:
        return ()
    modules = [
        json.dumps({"name": name, "path": str(path), "base_model_name": model.served_name})
        for name, path in adapters.items()
    ]
    words = ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank)]
    # The others wait in main memory; what is not there either it would read from its folder again.
    words += ["--max-cpu-loras", str(max(slots, _MOST_IN_MEMORY))]
    return [*words, "--lora-modules", *modules] if modules else words


def _lora_slots(model: VllmModel, *, on_gpu: bool) -> int:
    slots = slots_of(model, on_gpu=on_gpu)
    # On a CPU, vLLM (0.32) applies what is in the last slot to requests without an adapter that share a batch with
    # some that have one. So that one stays empty.
    return slots + 1 if slots and not on_gpu else slots
