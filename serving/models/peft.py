"""A LoRA adapter as PEFT saves it, converted to the GGUF file that llama.cpp applies.

What cannot be converted without changing what the adapter does is refused by name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.models.adapters import UnfitAdapter, check_adapter
from serving.models.gguf import GgufError, Header, read_header
from serving.models.safetensors import Matrix, SafetensorsError, read_safetensors
from serving.models.sources import ModelError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# ``llama``: Llama, Mistral, SmolLM. Its GGUF files have the rows of these matrices in another order than Hugging
# Face's: each head's rotated pairs side by side (LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py).
_PERMUTED = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}}
_FAMILIES = frozenset(
    {*_PERMUTED, "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3"}
)
# What a config may say of how the matrices began, without having changed the base model's weights for it.
_HARMLESS_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two matrices of one module: ``a`` [rank, in], ``b`` [out, rank]."""

    a: Matrix
    b: Matrix


def convert_adapter(folder: Path, base: Path, target: Path) -> int:
    """Write the adapter in a PEFT ``folder`` as a GGUF file for the model ``base``; returns how many matrices it changes.

    ``target`` appears whole or not at all, and has been checked against the base. Raises :class:`ModelError`.
    """
    try:
        config = _config(folder)
        header = read_header(base)
        pairs = _named(_pairs(folder), header)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            _write(partial, _scaled(pairs, config), config, header)
            check_adapter(partial, base)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except (GgufError, SafetensorsError, UnfitAdapter) as error:
        raise ModelError(f"cannot convert {folder} for {base.name}: {error}") from error
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ModelError(f"cannot convert {folder}:{where} {error.strerror or error}") from error
    return len(pairs)


def _config(folder: Path) -> Mapping[str, Any]:
    """The adapter's settings, none of which GGUF has no place for."""
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except ValueError as error:
        raise UnfitAdapter(f"its {_CONFIG} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise UnfitAdapter(f"peft_type in its {_CONFIG} is {found!r}; only 'LORA' can be converted")
    refused = {
        "use_dora": "DoRA also scales each column of the weights",
        "use_qalora": "QA-LoRA pools its inputs",
        "modules_to_save": "whole layers were trained; merge the adapter, and convert the merged model",
        "trainable_token_indices": "embeddings were trained; merge the adapter, and convert the merged model",
        "target_parameters": "parameters outside of linear layers were trained",
        "layer_replication": "its base model has layers that are repeated",
        "lora_bias": "GGUF adapters have no biases",
        "fan_in_fan_out": "its matrices are those of Conv1D layers",
        "alora_invocation_tokens": "this engine does not apply activated LoRA (aLoRA)",
    }
    reasons = [f"{key}: {reason}" for key, reason in refused.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"bias: {config['bias']!r}: GGUF adapters have no biases")
    if config.get("init_lora_weights") not in _HARMLESS_BEGINNINGS:
        reasons.append(
            f"init_lora_weights: {config['init_lora_weights']!r}: it counts from changed base weights; save it "
            "with path_initial_model_for_weight_conversion"
        )
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas):
        reasons.append("lora_alpha: a number is needed")
    if reasons:
        raise UnfitAdapter("; ".join(reasons))
    return config


def _pairs(folder: Path) -> dict[str, _Pair]:
    """The matrices by the name of their module in the Hugging Face model."""
    if not (folder / _WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise UnfitAdapter(
            "its adapter_model.bin is a pickle, which may run programs; "
            "save it again with safe_serialization=True"
        )
    tensors = read_safetensors(folder / _WEIGHTS)
    modules: dict[str, dict[str, Matrix]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if found is None:
            raise UnfitAdapter(
                f"its tensor {name!r} cannot be converted; only lora_A and lora_B of layers can"
            )
        modules.setdefault(found[1], {})[found[2]] = tensor.floats()
    pairs = {}
    for module, matrices in modules.items():
        a, b = matrices.get("A"), matrices.get("B")
        if a is None or b is None:
            raise UnfitAdapter(f"of {module!r} it has only one of lora_A and lora_B")
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] > 0:
            raise UnfitAdapter(
                f"the shapes {list(a.shape)} and {list(b.shape)} of its {module!r} do not fit each other"
            )
        pairs[module] = _Pair(a, b)
    return pairs


def _named(pairs: Mapping[str, _Pair], header: Header) -> dict[str, tuple[str, _Pair]]:
    """By the base model's name of each tensor: the module's name, and the matrices in the base's order of rows."""
    # Takes a tenth of a second, which other commands need not wait for.
    import gguf

    architecture = header.text("general.architecture") or ""
    if architecture not in _FAMILIES:
        raise UnfitAdapter(
            f"the base model's architecture is {architecture!r}; "
            f"adapters of {', '.join(sorted(_FAMILIES))} can be converted"
        )
    kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, header.integer(f"{architecture}.block_count") or 0)
    named = {}
    for module, pair in pairs.items():
        stem = names.get_name(module)
        if stem is None:
            raise UnfitAdapter(
                f"it changes {module!r}, which is not known of {architecture!r} models"
            )
        key = _PERMUTED.get(architecture, {}).get(stem.rpartition(".")[2])
        b = pair.b
        if key is not None:
            all_heads = header.integer(f"{architecture}.attention.head_count")
            b = _permuted(b, header.integer(f"{architecture}.{key}") or all_heads)
        named[f"{stem}.weight"] = module, _Pair(pair.a, b)
    return named


def _permuted(rows: Matrix, heads: int | None) -> Matrix:
    """Hugging Face's order of a head's rows, all first halves of pairs then all second, made llama.cpp's."""
    if not heads or len(rows) % (2 * heads):
        raise UnfitAdapter(f"its {len(rows)} rows do not fit the base model's {heads} heads")
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _scaled(named: Mapping[str, tuple[str, _Pair]], config: Mapping[str, Any]) -> dict[str, _Pair]:
    """With each module's own scale worked into ``b``, so that the file's one alpha is right for all.

    llama.cpp multiplies by alpha / rank; PEFT by the module's alpha / rank, with ``use_rslora`` alpha / √rank.
    """
    alphas: Mapping[str, float] = config.get("alpha_pattern") or {}
    scaled = {}
    for name, (module, pair) in named.items():
        rank = len(pair.a)
        alpha = next(
            (alphas[key] for key in alphas if re.match(rf"(.*\.)?({key})$", module)),
            config["lora_alpha"],
        )
        wanted = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        factor = np.float32(wanted * rank / _file_alpha(config))
        scaled[name] = _Pair(pair.a, pair.b * factor)
    return scaled


def _file_alpha(config: Mapping[str, Any]) -> float:
    """llama.cpp takes an alpha of 0 for none at all."""
    return float(config["lora_alpha"]) or 1.0


def _write(
    path: Path, pairs: Mapping[str, _Pair], config: Mapping[str, Any], header: Header
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, header.text("general.architecture") or "")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _file_alpha(config))
    for name, pair in pairs.items():
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(pair.a))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(pair.b))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
