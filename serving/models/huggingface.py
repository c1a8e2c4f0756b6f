"""Models in Hugging Face's format: from a config's ``source:`` to a folder, and what its files say of the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from serving.models.sources import ModelError

CONFIG = "config.json"
HUB = "hf://"
_GGUF = ".gguf"
# Other frameworks' copies of the weights, and what only training needs.
_NOT_NEEDED = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pt", "*.pth", "original/*", "optimizer*"]
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_FLOAT32 = "float32"
# Layers whose cache is not a key and a value for each token and head.
_OTHER_CACHES = ("kv_lora_rank", "layers_block_type", "mamba_d_state", "ssm_cfg")
_ATTENTION = {"full_attention", "sliding_attention"}


def is_gguf(source: str) -> bool:
    """Whether a source names a GGUF file rather than a folder or a repository."""
    return source.endswith(_GGUF)


def resolve_folder(source: str) -> Path:
    """The folder that ``source`` names, downloaded if need be; raises :class:`ModelError`.

    ``hf://ORG/REPO`` is a repository on the Hugging Face Hub (``hf://ORG/REPO@REVISION`` pins it); anything else a path.
    """
    folder = _on_hub(source) if source.startswith(HUB) else Path(source).expanduser()
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}")
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"{folder} has no {CONFIG}; name a folder or repository in Hugging Face's format (source)"
        )
    return folder


def _on_hub(source: str) -> Path:
    organisation, _, repository = source.removeprefix(HUB).partition("/")
    repository, _, revision = repository.partition("@")
    if not organisation or not repository or "/" in repository:
        raise ModelError(f"{source!r} is not of the form hf://ORG/REPO or hf://ORG/REPO@REVISION")
    try:
        return Path(
            snapshot_download(
                f"{organisation}/{repository}",
                revision=revision or None,
                ignore_patterns=_NOT_NEEDED,
            )
        )
    except Exception as error:  # the Hub's HTTP library, and so its errors, differ between versions
        raise ModelError(
            f"{source}: cannot download it: {error}; connect to the network, or download it elsewhere and "
            "give the folder as the source (a gated one needs 'hf auth login' or HF_TOKEN)"
        ) from error


@dataclass(frozen=True, slots=True)
class Description:
    """What a folder's files say of its model.

    ``kv_elements_per_token``: numbers of keys and values of a token, None where the model keeps something else.
    ``lora_elements``: numbers of a LoRA of rank 1 of all linear layers; 0 where that is not known.
    """

    model_type: str
    template: str
    weights_bytes: int
    kv_elements_per_token: int | None
    is_float32: bool = False
    lora_elements: int = 0


def describe(folder: Path) -> Description:
    """Read a folder's small files; raises :class:`ModelError` for what cannot be read."""
    config = _json(folder / CONFIG)
    # Of models that see, the part that writes.
    text = config.get("text_config")
    shape = text if isinstance(text, dict) else config
    return Description(
        model_type=str(shape.get("model_type", "")),
        template=_template(folder),
        weights_bytes=next(
            (
                total
                for pattern in _WEIGHTS
                if (total := sum(file.stat().st_size for file in folder.glob(pattern)))
            ),
            0,
        ),
        kv_elements_per_token=_kv_elements(shape),
        is_float32=_FLOAT32
        in [part.get(key) for part in (config, shape) for key in ("dtype", "torch_dtype")],
        lora_elements=_lora_elements(shape),
    )


def _kv_elements(shape: Mapping[str, Any]) -> int | None:
    kinds = shape.get("layer_types") or ()
    if any(shape.get(name) for name in _OTHER_CACHES) or not _ATTENTION.issuperset(kinds):
        return None
    layers, heads, width = (
        shape.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int)):
        return None
    kv_heads = shape.get("num_key_value_heads") or heads
    head_width = shape.get("head_dim") or width // heads
    return int(2 * layers * kv_heads * head_width)


def _lora_elements(shape: Mapping[str, Any]) -> int:
    kv_elements, layers = _kv_elements(shape), shape.get("num_hidden_layers")
    width, inner = shape.get("hidden_size"), shape.get("intermediate_size")
    if not kv_elements or not layers or not width or not isinstance(inner, int):
        return 0
    heads = shape["num_attention_heads"]
    queries = heads * (shape.get("head_dim") or width // heads)
    keys = kv_elements // (2 * layers)
    experts = shape.get("num_local_experts") or shape.get("num_experts") or 1
    inner = shape.get("moe_intermediate_size") or inner
    # A has as many columns as the layer has inputs, B as many rows as it has outputs.
    attention = 2 * (width + queries) + 2 * (width + keys)
    return int(layers * (attention + 3 * experts * (width + inner)))


def _template(folder: Path) -> str:
    """The chat template; empty if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    file = folder / "tokenizer_config.json"
    template = _json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("tool_use") or named.get("default")
    return template if isinstance(template, str) else ""


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}; fetch the model again (source)") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no object; fetch the model again (source)")
    return values
