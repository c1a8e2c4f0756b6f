"""How a model's rotary position embeddings are scaled for contexts longer than those it was trained on first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from serving.models.checkpoint.config import FILE, Config, UnfitCheckpoint

# Of transformers' attention_factor, mscale and the like, GGUF says less than what these settings mean there.
_OWN_FACTORS = ("attention_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True)
class Rope:
    """``tensors`` are divisors of the frequencies, by the GGUF name of each."""

    base: float
    base_of_sliding_layers: float | None = None
    scaling: gguf.RopeScalingType | None = None
    factor: float | None = None
    original_context: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    tensors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add all but the tensors."""
        writer.add_rope_freq_base(self.base)
        if self.base_of_sliding_layers is not None:
            writer.add_rope_freq_base_swa(self.base_of_sliding_layers)
        if self.scaling is not None:
            writer.add_rope_scaling_type(self.scaling)
        if self.original_context is not None:
            writer.add_rope_scaling_orig_ctx_len(self.original_context)
        for value, add in (
            (self.factor, writer.add_rope_scaling_factor),
            (self.attention_factor, writer.add_rope_scaling_attn_factors),
            (self.beta_fast, writer.add_rope_scaling_yarn_beta_fast),
            (self.beta_slow, writer.add_rope_scaling_yarn_beta_slow),
        ):
            if value is not None:
                add(value)


def read_rope(config: Config) -> Rope:
    """What the config says, in ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    Raises :class:`UnfitCheckpoint` for what llama.cpp does not compute.
    """
    settings, base, local_base = _settings(config)
    kind = settings.get("rope_type", settings.get("type")) or "default"
    try:
        if kind == "default":
            return Rope(base, local_base)
        if kind == "linear":
            scaling = gguf.RopeScalingType.LINEAR
            return Rope(base, local_base, scaling, float(settings["factor"]))
        if kind == "llama3":
            divisors = _llama3_divisors(settings, base, config.head_width)
            return Rope(base, local_base, tensors={"rope_freqs.weight": divisors})
        if kind == "yarn":
            return _yarn(settings, base, config)
        if kind in ("longrope", "su"):
            return _long_rope(settings, base, config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UnfitCheckpoint(
            f"its {FILE} does not say all of the rope scaling {kind!r} ({error!r})"
        ) from error
    raise UnfitCheckpoint(f"its {FILE} has the rope scaling {kind!r}, which GGUF cannot express")


def _settings(config: Config) -> tuple[Mapping[str, Any], float, float | None]:
    """The scaling, the base, and that of layers with a sliding window where it is another."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    local = config.get("rope_local_base_freq")
    if "full_attention" in parameters:  # by kind of layer
        local = parameters.get("sliding_attention", {}).get("rope_theta", local)
        parameters = parameters["full_attention"]
    base = parameters.get("rope_theta", config.get("rope_theta"))
    if not isinstance(base, int | float):
        raise UnfitCheckpoint(f"rope_theta in its {FILE} is {base!r}; a number is needed")
    return parameters, float(base), None if local is None else float(local)


def _llama3_divisors(settings: Mapping[str, Any], base: float, width: int) -> NDArray[np.float32]:
    """As transformers' modeling_rope_utils and llama.cpp's conversion scripts have it."""
    factor, context = settings["factor"], settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    wavelengths = 2 * math.pi * base ** (np.arange(0, width, 2) / width)
    smooth = (context / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelengths > context / low, factor, between)
    return np.where(wavelengths < context / high, 1.0, divisors).astype(np.float32)


def _yarn(settings: Mapping[str, Any], base: float, config: Config) -> Rope:
    own = [key for key in _OWN_FACTORS if settings.get(key) is not None]
    if own or settings.get("truncate") is False:
        raise UnfitCheckpoint(
            f"its {FILE} has the rope scaling 'yarn' with {(own or ['truncate'])[0]}, "
            "which GGUF cannot express"
        )
    return Rope(
        base,
        scaling=gguf.RopeScalingType.YARN,
        factor=float(settings["factor"]),
        original_context=int(
            settings.get("original_max_position_embeddings")
            or config.integer("max_position_embeddings")
        ),
        beta_fast=settings.get("beta_fast"),
        beta_slow=settings.get("beta_slow"),
    )


def _long_rope(settings: Mapping[str, Any], base: float, config: Config) -> Rope:
    """Phi-3's: one set of divisors for contexts up to the original one, another for longer ones."""
    long, short = (np.array(settings[f"{key}_factor"], np.float32) for key in ("long", "short"))
    context = settings.get("original_max_position_embeddings") or config.integer(
        "original_max_position_embeddings"
    )
    stretch = config.integer("max_position_embeddings") / context
    attention = settings.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretch) / math.log(context)) if stretch > 1 else 1.0
    return Rope(
        base,
        scaling=gguf.RopeScalingType.LONGROPE,
        original_context=int(context),
        attention_factor=float(attention),
        tensors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
    )
