"""Records what transformers computes of small models: ``python -m tests.engine.checkpoints.record``.

Needs torch and transformers (``tools/finetune/requirements.txt``), so it runs in an environment of its own, by hand,
when a family is added. The weights are those of ``tests/tiny_checkpoints.py``.
"""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.tiny_checkpoints import PROMPT, RECORDED, TOKENS, values

KEPT_LOGITS = 3
SIZES = {
    "vocab_size": TOKENS, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
WIDE = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.5, 2, 3, 4, 5, 6.5]}
PHI = SIZES | {"num_key_value_heads": 2}


def long_rope(original: int) -> dict:
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **FACTORS,
        },
    }  # fmt: skip


def windows(every: int, layers: int) -> dict:
    return {
        "num_hidden_layers": layers, "sliding_window": 8, "query_pre_attn_scalar": 32,
        "layer_types": [
            "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)
        ],
    }  # fmt: skip


MODELS = {
    "llama": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "llama-linear-biases": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", WIDE | {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "qwen2moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 96}),
    "qwen3": ("Qwen3", WIDE),
    "qwen3moe": ("Qwen3Moe", WIDE | EXPERTS | {"norm_topk_prob": True}),
    "gemma": ("Gemma", WIDE),
    "gemma2": ("Gemma2", WIDE | windows(2, 4) | {"attn_logit_softcapping": 20.0}),
    "gemma3": (
        "Gemma3",
        WIDE
        | windows(6, 7)
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-short": ("Phi3", long_rope(256)),
    "phi3-long": ("Phi3", long_rope(16)),
}  # fmt: skip


def main() -> None:
    """Write ``models.json`` and ``logits.npz``."""
    entries, logits = {}, {}
    for name, (kind, settings) in MODELS.items():
        suffix = "TextConfig" if kind == "Gemma3" else "Config"
        config = getattr(transformers, f"{kind}{suffix}")(**SIZES | settings)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            shapes = shapes_of(Path(folder) / "model.safetensors")
            saved = json.loads((Path(folder) / "config.json").read_text())
            write(Path(folder) / "model.safetensors", shapes)
            model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            found = model(torch.tensor([PROMPT])).logits[0, -KEPT_LOGITS:]
        entries[name] = {"config": saved, "shapes": shapes}
        logits[name] = found.numpy().astype(np.float32)
        print(f"{name}: {len(shapes)} tensors, logits of {found.std():.2f} on average")
    (RECORDED / "models.json").write_text(told(entries))
    np.savez_compressed(RECORDED / "logits.npz", **logits)


def told(entries: dict) -> str:
    """JSON with a line a model."""
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def shapes_of(path: Path) -> dict[str, list[int]]:
    """By the names that the file has."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: entry["shape"] for name, entry in sorted(header.items())}


def write(path: Path, shapes: dict[str, list[int]]) -> None:
    """The file with the values that the tests use."""
    from safetensors.numpy import save_file

    tensors = {name: values(name, shape) for name, shape in shapes.items()}
    save_file(tensors, path, {"format": "pt"})


if __name__ == "__main__":
    main()
