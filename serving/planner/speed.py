"""How fast a model decodes and prefills on a rig: a roofline, with factors taken from published measurements.

A decode step reads weights and cache at a share of a device's bandwidth; its arithmetic is done at a share of its
rate; each layer costs something to start. Sources, and what the factors come to beside them, are in
``docs/planning.md``. All of it is an estimate, and says between what bounds it expects the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from serving.models.architecture import (
    Architecture,
    Attention,
    Experts,
    LatentAttention,
    Layer,
    Mixer,
    Recurrent,
)
from serving.planner.memory import Offload, places
from serving.planner.quantization import row_bytes
from serving.planner.rig import Device, Kind, Rig
from serving.planner.settings import Settings
from serving.planner.weights import ModelWeights


@dataclass(frozen=True, slots=True)
class _Efficiency:
    """Shares of a kind of device's peaks, what a layer costs to start, and how far estimates have been off.

    ``weights_per_clock`` is how many quantized weights a compute unit unpacks; None: that has not limited any.
    """

    bandwidth: float
    bandwidth_of_16_bits: float
    int8: float
    fp16: float
    layer_seconds: float
    uncertainty: float
    weights_per_clock: float | None = None


_EFFICIENCIES: Mapping[Kind, _Efficiency] = MappingProxyType(
    {
        "nvidia": _Efficiency(0.80, 0.90, 0.28, 0.50, 20e-6, 0.25, weights_per_clock=10),
        "amd": _Efficiency(0.75, 0.75, 0.36, 0.30, 30e-6, 0.35, weights_per_clock=5),
        "amd_unified": _Efficiency(0.76, 0.80, 0.28, 0.30, 30e-6, 0.30),
        "intel": _Efficiency(0.65, 0.65, 0.20, 0.30, 80e-6, 0.50),
        "apple": _Efficiency(0.85, 0.85, 0.70, 0.70, 120e-6, 0.30),
        # Of the bandwidth that was measured here, or is assumed to be measurable.
        "cpu": _Efficiency(0.85, 0.85, 0.15, 0.50, 30e-6, 0.35),
    }
)
# vLLM computes in 16 bits, or FP8 where the card does, in graphs, and loses nothing to small batches.
_VLLM = _Efficiency(0.85, 0.90, 0.50, 0.55, 20e-6, 0.30)
_VLLM_STEP_SECONDS = 1e-3
# Cards without matrix units: one was a third slower than estimated (a GTX 1050 Ti), and few are measured.
_UNCERTAINTY_WITHOUT_MATRIX_UNITS = 0.40
# What a layer of latent attention costs beyond others', and what is known of its speed.
_LATENT_LAYER_SECONDS, _LATENT_UNCERTAINTY = 80e-6, 0.40
# Weights on their way to a card, over 16 lanes of PCIe 4.0 or 8 of 5.0, from memory that is not pinned.
_PCIE_BYTES_PER_SECOND = 12e9
# Layers, or experts, that some device beside the cards computes.
_UNCERTAINTY_OF_SPLITS = 0.40
# Experts have few rows each, and leave units idle. To choose them, and to add up what they say, takes as many kernels
# again as a layer has, and this much.
_EXPERTS_RATE, _EXPERTS_LAYER_SECONDS = 0.45, 20e-6
# A gated delta net's convolution, norms, gates and state are kernels that attention has not.
_DELTA_NET_LAYER_SECONDS = 60e-6
# Kernels for quantized weights use the instructions that gaming cards have, wherever there are wider ones.
_QUANTIZED_OPERATIONS_PER_CLOCK = 2048
# Kernels for a few rows at a time use a quarter of the rate, until those for many take over.
_FEW_ROWS_LOSS, _MOST_ROWS_LOST = 3, 24
# A step's sampling and book-keeping, for the step and for each sequence (docs/results/engine.md).
_STEP_SECONDS, _SEQUENCE_SECONDS = 0.2e-3, 0.06e-3


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second: of one user alone, of all together, and of prompts; ``uncertainty`` is a share of each.

    ``seconds_per_token`` is what each of all users waits from one token to the next.
    """

    one_user: float
    all_users: float
    prefill: float
    users: int
    uncertainty: float

    @property
    def seconds_per_token(self) -> float:
        """From one token of a user to the next, when all are there."""
        return self.users / self.all_users

    def first_token_seconds(self, prompt_tokens: int) -> float:
        """Until a prompt is prefilled that nobody else's delays."""
        return prompt_tokens / self.prefill + 1 / self.one_user


def speed_of(
    architecture: Architecture,
    weights: ModelWeights,
    rig: Rig,
    offload: Offload,
    settings: Settings,
    *,
    users: int,
    context_tokens: int,
    is_quantized: bool = True,
    is_vllm: bool = False,
) -> Speed:
    """What a rig does with a model split so, for ``users`` whose texts have ``context_tokens`` each.

    vLLM's cards are one device: what they have together (:func:`serving.planner.rig.together`).
    """
    parts = _parts(architecture, weights, rig, offload, settings)
    if is_vllm:
        for part in parts:
            part.factors = _VLLM

    def seconds(rows: int, cached_tokens: int) -> float:
        """Of a step, its devices one after the other."""
        share = _share_of_experts(architecture, rows)
        return sum(
            part.seconds(rows, cached_tokens, share, is_quantized=is_quantized) for part in parts
        )

    def step_seconds(rows: int) -> float:
        step = _VLLM_STEP_SECONDS if is_vllm else _STEP_SECONDS + rows * _SEQUENCE_SECONDS
        return seconds(rows, rows * context_tokens) + step

    rows = settings.step_tokens
    # On average a prompt's token looks at half of what there is in the end.
    pairs = rows * context_tokens / 2
    prefill_seconds = sum(
        part.prefill_seconds(
            rows, context_tokens, pairs, has_cards=bool(offload.shares), is_quantized=is_quantized
        )
        for part in parts
    )
    uncertainties = [part.factors.uncertainty for part in parts]
    if any(part.latent_layers for part in parts):
        uncertainties.append(_LATENT_UNCERTAINTY)
    if any(_lacks_matrix_units(part.device) for part in parts):
        uncertainties.append(_UNCERTAINTY_WITHOUT_MATRIX_UNITS)
    if len({part.device.kind == "cpu" for part in parts}) > 1:
        uncertainties.append(_UNCERTAINTY_OF_SPLITS)
    return Speed(
        one_user=1 / step_seconds(1),
        all_users=users / step_seconds(users),
        prefill=rows / prefill_seconds,
        users=users,
        uncertainty=max(uncertainties),
    )


@dataclass(slots=True)
class _Part:
    """What one device has of a model: what every step reads and computes, and experts, of which it needs some."""

    device: Device
    factors: _Efficiency
    latent_layers: int = 0
    start_seconds: float = 0.0
    always_bytes: int = 0
    expert_bytes: int = 0
    always_elements: int = 0
    expert_elements: int = 0
    operations: float = 0.0
    cache_bytes_per_token: float = 0.0
    # Of attention, for each row and each token that it looks at.
    cache_operations: float = 0.0

    def seconds(
        self, rows: int, cached_tokens: int, share_of_experts: float, *, is_quantized: bool
    ) -> float:
        """Of a step with so many rows, which look at so many cached tokens between them."""
        device, factors = self.device, self.factors
        has_own_kernels = is_quantized and factors is not _VLLM
        read_bytes = (
            self.always_bytes
            + self.expert_bytes * share_of_experts
            + self.cache_bytes_per_token * cached_tokens
        )
        share = factors.bandwidth if is_quantized else factors.bandwidth_of_16_bits
        seconds = read_bytes / (share * device.bandwidth_bytes)
        if has_own_kernels and (unpacked := _unpacked_per_second(device, factors)):
            elements = self.always_elements + self.expert_elements * share_of_experts
            seconds = max(seconds, elements / unpacked)
        seconds += self.start_seconds
        if has_own_kernels:
            rate = factors.int8 * _quantized_operations(device)
        else:
            rate = factors.fp16 * device.fp16_operations
        if rate:
            loses = device.kind != "cpu" and factors is not _VLLM
            lost = min(_FEW_ROWS_LOSS * (rows - 1), _MOST_ROWS_LOST) if loses else 0
            seconds += (rows - 1 + lost) * self.operations / rate
        return seconds

    def prefill_seconds(
        self, rows: int, cached_tokens: int, pairs: float, *, has_cards: bool, is_quantized: bool
    ) -> float:
        """Of so many rows of prompts, in which so many pairs of tokens look at each other.

        What the processor has is sent to a card for that, if there is one and it is faster so.
        """
        rate = self.factors.fp16 * self.device.fp16_operations
        seconds = self.seconds(rows, cached_tokens, 1.0, is_quantized=is_quantized)
        seconds += pairs * self.cache_operations / rate if rate else 0.0
        if self.device.kind == "cpu" and has_cards:
            sent_bytes = self.always_bytes + self.expert_bytes
            seconds = min(seconds, sent_bytes / _PCIE_BYTES_PER_SECOND)
        return seconds


def _parts(
    architecture: Architecture,
    weights: ModelWeights,
    rig: Rig,
    offload: Offload,
    settings: Settings,
) -> list[_Part]:
    """The devices that have something of the model, with what they have."""
    host, *cards = (_Part(device, _EFFICIENCIES[device.kind]) for device in (rig.host, *rig.cards))
    where = places(len(architecture.layers), offload)
    active_share = _share_of_experts(architecture, 1)
    for index, (layer, sizes) in enumerate(zip(architecture.layers, weights.layers, strict=True)):
        place = where[index]
        part = host if place is None else cards[place]
        of_experts = host if index < offload.experts_on_cpu else part
        part.start_seconds += _start_seconds(layer, part.factors)
        part.latent_layers += isinstance(layer.mixer, LatentAttention)
        part.always_bytes += sizes.total_bytes - sizes.expert_bytes
        part.always_elements += sizes.elements - sizes.expert_elements
        of_experts.expert_bytes += sizes.expert_bytes
        of_experts.expert_elements += sizes.expert_elements
        part.cache_bytes_per_token += _cache_bytes_per_token(layer.mixer, settings)
        part.cache_operations += _cache_operations(layer.mixer)
        part.operations += 2.0 * (sizes.elements - sizes.expert_elements)
        of_experts.operations += 2.0 * sizes.expert_elements * active_share / _EXPERTS_RATE
    output = where[-1]
    last = host if output is None else cards[output]
    last.always_bytes += weights.output_bytes
    last.always_elements += architecture.width * architecture.vocabulary
    last.operations += 2.0 * architecture.width * architecture.vocabulary
    return [part for part in (host, *cards) if part.always_bytes or part.expert_bytes]


def _start_seconds(layer: Layer, factors: _Efficiency) -> float:
    """What a layer's kernels cost to start."""
    seconds = factors.layer_seconds
    match layer.mixer:
        case LatentAttention():
            seconds += _LATENT_LAYER_SECONDS
        case Recurrent(kind="gated_delta_net"):
            seconds += _DELTA_NET_LAYER_SECONDS
    if isinstance(layer.feed_forward, Experts):
        seconds += factors.layer_seconds + _EXPERTS_LAYER_SECONDS
    return seconds


def _unpacked_per_second(device: Device, factors: _Efficiency) -> float | None:
    """How many quantized weights a card can unpack, where that may limit it."""
    clocks = _clocks(device)
    if clocks is None or factors.weights_per_clock is None:
        return None
    return factors.weights_per_clock * clocks


def _quantized_operations(device: Device) -> float:
    """INT8 operations a second that kernels for quantized weights have, which do not use the widest instructions."""
    clocks = _clocks(device)
    if clocks is None:
        return device.int8_operations
    return min(device.int8_operations, _QUANTIZED_OPERATIONS_PER_CLOCK * clocks)


def _lacks_matrix_units(device: Device) -> bool:
    """Whether llama.cpp multiplies on it without them."""
    card = device.card
    return card is not None and "mmq-dp4a" in card.architecture.kernels.get("llama_cpp", ())


def _clocks(device: Device) -> float | None:
    """A second, of all its compute units; None if they are not known."""
    card = device.card
    if card is None or card.rated_mhz is None:
        return None
    return 1e6 * card.compute_units * card.rated_mhz


def _share_of_experts(architecture: Architecture, rows: int) -> float:
    """How many of all experts some row of a step is expected to need, if each row chooses by chance."""
    parts = (layer.feed_forward for layer in architecture.layers)
    experts = next((part for part in parts if isinstance(part, Experts)), None)
    if experts is None:
        return 1.0
    return float(1 - (1 - experts.active / experts.count) ** rows)


def _cache_bytes_per_token(mixer: Mixer | None, settings: Settings) -> float:
    """What a row reads of the cache for each token that it looks at, windows counted as they are seen."""
    match mixer:
        case Attention() as attention:
            keys = row_bytes(settings.key_type, attention.kv_heads * attention.key_width)
            return keys + row_bytes(settings.value_type, attention.kv_heads * attention.value_width)
        case LatentAttention() as attention:
            return row_bytes(settings.key_type, attention.cache_elements)
    return 0.0


def _cache_operations(mixer: Mixer | None) -> float:
    match mixer:
        case Attention() as attention:
            return 2.0 * attention.heads * (attention.key_width + attention.value_width)
        case LatentAttention() as attention:
            return 2.0 * attention.heads * (attention.cache_elements + attention.kv_rank)
    return 0.0
