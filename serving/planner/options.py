"""The ways to serve a model on a rig: which fit, how fast and at what price, and which one to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from serving.config import CostConfig, LlamaCppModel
from serving.cost.model import CostModel
from serving.hardware.catalog import catalog_cards
from serving.models.architecture import Attention, Experts
from serving.planner.memory import MIB, Memory, Offload, Parts, memory_of
from serving.planner.published import awq_source_of
from serving.planner.quality import grade_of
from serving.planner.rig import Device, Rig, together
from serving.planner.settings import Settings
from serving.planner.speed import Speed, speed_of
from serving.planner.subject import Subject
from serving.planner.vllm import (
    DEFAULT_STEP_TOKENS,
    VLLM_HOST_BYTES,
    in_awq,
    in_fp8,
    vllm_memory,
)

Engine = Literal["llama_cpp", "llama_server", "vllm"]
# Tokens of one request, in the order in which they are tried.
_CONTEXTS = (262144, 131072, 65536, 32768, 16384, 8192, 4096)
_LEAST_CONTEXT = 4096
# When only some of a model is on cards: as much as a chat needs, for context is dear then.
_SPLIT_CONTEXT = 8192
_USERS_TO_SHOW = (1, 4, 16)
# Where it gives more context; llama.cpp quantizes heads whose widths are whole blocks.
_SMALL_CACHE, _BLOCK = "Q8_0", 32
# Over so many cards a model's heads can be shared out.
_VLLM_CARDS = (1, 2, 4, 8)
# Of a card's memory, what is left beside displays and a reserve.
_SHARE_FOR_ENGINES = 0.97
# So much worse in quality may an option be that keeps all on the cards, rather than one that does not.
_GRADES_OF_A_SPLIT = 2
# What a quantized cache loses was measured here for no model.
_GRADES_OF_A_SMALL_CACHE = 1
# Slower than this is slower than people read.
COMFORTABLE_TOKENS_PER_SECOND = 8.0
# What a config has main memory set aside for, if it does not say.
_PREFIX_CACHE_BYTES = MIB * LlamaCppModel.model_fields["prefix_cache_mib"].default
# What a card draws on average while it decodes, of its limit; and the machine around it, in watts and USD.
_SHARE_OF_LIMIT = 0.8
_HOST_WATTS, _HOST_USD = 70.0, 600.0


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked for; None leaves it open. ``prompt_tokens`` are those that TTFT is stated for."""

    context_tokens: int | None = None
    users: int | None = None
    first_token_seconds: float | None = None
    token_seconds: float | None = None
    prompt_tokens: int = 1000


@dataclass(frozen=True, slots=True)
class Option:
    """One way to serve a model. All figures are estimates."""

    mixture: str
    engine: Engine
    settings: Settings
    offload: Offload
    memory: Memory
    speed: Speed
    headroom_bytes: int
    watts: float
    usd_per_million: float
    meets_wishes: bool

    @property
    def is_all_on_cards(self) -> bool:
        """Whether nothing of the model is computed beside the cards."""
        return (
            bool(self.offload.shares)
            and self.offload.layers is None
            and not self.offload.experts_on_cpu
        )

    @property
    def is_split(self) -> bool:
        """Whether cards have some of it, and the processor the rest."""
        return bool(self.offload.shares) and not self.is_all_on_cards


@dataclass(frozen=True, slots=True)
class Plan:
    """The options that fit, the recommended one first, and why; without any, what would have to change."""

    subject: Subject
    rig: Rig
    wishes: Wishes
    options: tuple[Option, ...]
    reason: str
    advice: tuple[str, ...] = ()


def plan(subject: Subject, rig: Rig, wishes: Wishes, cost: CostConfig) -> Plan:
    """Try all options of a model on a rig."""
    maker = _Maker(subject, rig, wishes, cost)
    options = sorted(maker.options(), key=_rank)
    if not options:
        return Plan(subject, rig, wishes, (), "", tuple(maker.advice()))
    best = options[0]
    if wishes.users is None:
        others = [each for each in options[1:] if each.speed.users == 1]
        shared = [
            each
            for each in options[1:]
            if each.speed.users > 1 and (each.mixture, each.engine) == (best.mixture, best.engine)
        ]
        options = [best, *shared, *others]
    return Plan(subject, rig, wishes, tuple(options), _reason(best, options))


def _rank(option: Option) -> tuple[object, ...]:
    """What to prefer: wishes met, for few users first, comfort, quality, then speed and room for context."""
    is_comfortable = option.speed.all_users / option.speed.users >= COMFORTABLE_TOKENS_PER_SECOND
    return (
        not option.meets_wishes,
        option.speed.users,
        not is_comfortable,
        grade_of(option.mixture)
        + (_GRADES_OF_A_SPLIT if option.is_split else 0)
        + (_GRADES_OF_A_SMALL_CACHE if option.settings.has_small_cache else 0),
        option.settings.context_length < _SPLIT_CONTEXT,
        option.settings.has_small_cache,
        -option.speed.all_users,
        option.engine,
        -option.settings.context_length,
    )


def _reason(best: Option, options: list[Option]) -> str:
    where = "on the card" if len(best.offload.shares) == 1 else "on the cards"
    place = f"all of it {where}" if best.is_all_on_cards else _split_words(best.offload)
    grade = grade_of(best.mixture)
    peers = [each for each in options if grade_of(each.mixture) == grade and each is not best]
    words = f"{best.mixture}, {place}"
    if not best.meets_wishes:
        return f"{words}: nothing that fits meets the SLO; this comes nearest"
    if peers:
        return f"{words}: the fastest of those that lose as little in quality"
    return f"{words}: the best quality that fits and is fast enough"


def _split_words(offload: Offload) -> str:
    if not offload.shares:
        return "on the processor"
    if offload.experts_on_cpu:
        return f"experts of {offload.experts_on_cpu} layers in main memory"
    return f"{offload.layers} layers on the card, the others on the processor"


class _Maker:
    """Makes the options of one plan."""

    def __init__(self, subject: Subject, rig: Rig, wishes: Wishes, cost: CostConfig) -> None:
        self._subject, self._rig, self._wishes, self._cost = subject, rig, wishes, cost
        self._architecture = subject.architecture
        longest = self._architecture.context_length
        if wishes.context_tokens is not None:
            self._contexts: tuple[int, ...] = (wishes.context_tokens,)
        else:
            ladder = tuple(each for each in _CONTEXTS if each < longest)
            self._contexts = (longest, *ladder) if longest <= _CONTEXTS[0] else ladder
        self._shares = tuple(float(card.memory_bytes) for card in rig.cards)
        self._has_windows = any(
            isinstance(layer.mixer, Attention) and layer.mixer.window_tokens is not None
            for layer in self._architecture.layers
        )
        self._may_shrink_cache = all(
            isinstance(layer.mixer, Attention)
            and not layer.mixer.key_width % _BLOCK
            and not layer.mixer.value_width % _BLOCK
            for layer in self._architecture.layers
        )
        self._has_experts = any(
            isinstance(layer.feed_forward, Experts) for layer in self._architecture.layers
        )

    def options(self) -> Iterator[Option]:
        """All that fit."""
        users = (self._wishes.users,) if self._wishes.users else _USERS_TO_SHOW
        for count in users:
            yield from self._of_vllm(count)
            for mixture in self._subject.mixtures:
                yield from self._of(mixture, count)

    def _of_vllm(self, users: int) -> Iterator[Option]:
        """In 16 bits, in FP8 where the card computes in it, in AWQ's 4 bits where that is published; over all cards if
        they are equal."""
        cards, architecture = self._rig.cards, self._architecture
        card = cards[0].card if cards else None
        kernels = card.architecture.kernels.get("vllm", ()) if card else ()
        are_equal = len({each.name for each in cards}) == 1 and len(cards) in _VLLM_CARDS
        if not kernels or not are_equal or self._subject.repo is None or architecture.is_encoder:
            return
        offered = {
            "BF16": "BF16" in self._subject.mixtures,
            "FP8": "fp8_w8a8" in kernels,
            # Without Marlin's kernels it is for memory alone, and slow.
            "AWQ": "marlin" in kernels and awq_source_of(self._subject.name) is not None,
        }
        for mixture, is_offered in offered.items():
            if is_offered:
                for context in self._contexts:
                    option = self._vllm_option(mixture, users, context)
                    if option is not None:
                        yield option
                        break

    def _vllm_option(self, mixture: str, users: int, context: int) -> Option | None:
        cards, architecture = self._rig.cards, self._architecture
        assert cards[0].card is not None
        weights = self._subject.weights("BF16")
        if mixture != "BF16":
            weights = in_fp8(weights) if mixture == "FP8" else in_awq(weights)
        found = vllm_memory(
            architecture,
            weights.total_bytes,
            cards[0].card.memory_mib * MIB,
            tensor_parallel=len(cards),
        )
        needed_tokens = users * context
        if found.cache_tokens < needed_tokens:
            return None
        cache = found.cache * needed_tokens // found.cache_tokens
        parts = Parts(found.weights, cache, found.activations, 0, found.overhead)
        host = Parts(overhead=VLLM_HOST_BYTES)
        if host.total > self._rig.host.memory_bytes:
            return None
        offload = Offload((1.0,))
        speed = speed_of(
            architecture,
            weights,
            Rig(self._rig.host, (together(cards),)),
            offload,
            Settings(context, users, batch_tokens=DEFAULT_STEP_TOKENS),
            users=users,
            context_tokens=min(context, 2 * self._wishes.prompt_tokens),
            # AWQ's weights are made FP16 on their way into the units.
            is_quantized=mixture == "FP8",
            is_vllm=True,
        )
        offload = Offload(self._shares)
        watts = _watts(self._rig, offload)
        return Option(
            mixture=mixture,
            engine="vllm",
            settings=Settings(context, users),
            offload=offload,
            memory=Memory(host, (parts,) * len(cards)),
            speed=speed,
            headroom_bytes=found.cache - cache,
            watts=watts,
            usd_per_million=self._usd_per_million(speed, watts),
            meets_wishes=self._meets(speed),
        )

    def _of(self, mixture: str, users: int) -> Iterator[Option]:
        on_cards = Offload(self._shares)
        ours = self._longest(mixture, "llama_cpp", on_cards, users, self._contexts)
        if ours is not None:
            yield ours
        # It cuts windows, so that more context fits.
        theirs = (
            self._longest(mixture, "llama_server", on_cards, users, self._contexts)
            if self._has_windows
            else None
        )
        if theirs is not None and (
            ours is None or theirs.settings.context_length > ours.settings.context_length
        ):
            yield theirs
        small = (
            self._longest(mixture, "llama_cpp", on_cards, users, self._contexts, _SMALL_CACHE)
            if self._may_shrink_cache
            else None
        )
        if small is not None and (
            ours is None or small.settings.context_length > ours.settings.context_length
        ):
            yield small
        if ours or theirs or not self._rig.cards:
            return
        short = (
            tuple(each for each in self._contexts if each <= _SPLIT_CONTEXT)[:1] or self._contexts
        )
        if self._has_experts:
            layers = len(self._architecture.layers)
            option = self._least(
                lambda count: self._longest(
                    mixture, "llama_server", replace(on_cards, experts_on_cpu=count), users, short
                ),
                layers,
            )
            if option is not None:
                yield option
                return
        layers = len(self._architecture.layers)
        option = self._least(
            lambda fewer: self._longest(
                mixture, "llama_cpp", replace(on_cards, layers=layers + 1 - fewer), users, short
            ),
            layers,
        )
        if option is not None:
            yield option
            return
        option = self._longest(mixture, "llama_cpp", Offload(), users, short)
        if option is not None:
            yield option

    def _least(self, make: Callable[[int], Option | None], most: int) -> Option | None:
        """The option of the smallest number that has one; what fits with few fits with more."""
        low, high = 1, most
        best = make(high)
        if best is None:
            return None
        while low < high:
            middle = (low + high) // 2
            option = make(middle)
            if option is None:
                low = middle + 1
            else:
                high, best = middle, option
        return best

    def _longest(
        self,
        mixture: str,
        engine: Engine,
        offload: Offload,
        users: int,
        contexts: tuple[int, ...],
        cache_type: str = "F16",
    ) -> Option | None:
        for context in contexts:
            option = self._option(mixture, engine, offload, users, context, cache_type)
            if option is not None:
                return option
        return None

    def _option(
        self,
        mixture: str,
        engine: Engine,
        offload: Offload,
        users: int,
        context: int,
        cache_type: str,
    ) -> Option | None:
        settings = Settings(
            context,
            users,
            key_type=cache_type,
            value_type=cache_type,
            has_full_windows=engine == "llama_cpp",
        )
        if self._architecture.is_encoder:
            settings = Settings(context, batch_tokens=context, is_pooled=True)
        weights = self._subject.weights(mixture)
        memory = memory_of(self._architecture, weights, settings, offload, self._subject.extras)
        memory = replace(memory, host=memory.host + Parts(extras=_PREFIX_CACHE_BYTES))
        headroom = headroom_bytes(memory, self._rig)
        if headroom < 0:
            return None
        speed = speed_of(
            self._architecture,
            weights,
            self._rig,
            offload,
            settings,
            users=users,
            context_tokens=min(context, 2 * self._wishes.prompt_tokens),
            is_quantized=mixture not in ("F32", "F16", "BF16"),
        )
        watts = _watts(self._rig, offload)
        return Option(
            mixture=mixture,
            engine=engine,
            settings=settings,
            offload=offload,
            memory=memory,
            speed=speed,
            headroom_bytes=headroom,
            watts=watts,
            usd_per_million=self._usd_per_million(speed, watts),
            meets_wishes=self._meets(speed),
        )

    def _meets(self, speed: Speed) -> bool:
        first, each = self._wishes.first_token_seconds, self._wishes.token_seconds
        prompt = self._wishes.prompt_tokens
        return (first is None or speed.first_token_seconds(prompt) <= first) and (
            each is None or speed.seconds_per_token <= each
        )

    def _usd_per_million(self, speed: Speed, watts: float) -> float:
        price = _price_usd(self._rig)
        cost = (
            self._cost
            if price is None
            else self._cost.model_copy(update={"hardware_price_usd": price})
        )
        seconds = 1e6 / speed.all_users
        return CostModel(cost).parts(seconds, seconds * watts).total_usd

    def advice(self) -> Iterator[str]:
        """What would have to change, when nothing fits: each alone would do."""
        users = self._wishes.users or 1
        least = self._contexts[-1]
        smallest = min(
            self._subject.mixtures, key=lambda each: self._subject.weights(each).total_bytes
        )
        settings = Settings(least, users)
        need = (
            _PREFIX_CACHE_BYTES
            + memory_of(
                self._architecture,
                self._subject.weights(smallest),
                settings,
                Offload(self._shares),
                self._subject.extras,
            ).total.total
        )
        there = sum(card.memory_bytes for card in self._rig.cards) + self._rig.host.memory_bytes
        yield (
            f"{smallest}, the smallest quantization, with {users} x {least:,} tokens needs "
            f"{_gib(need)}; cards and main memory have {_gib(there)} together"
        )
        if (self._wishes.context_tokens or 0) > _LEAST_CONTEXT or users > 1:
            shorter = _Maker(
                self._subject,
                self._rig,
                replace(self._wishes, context_tokens=None, users=1),
                self._cost,
            )
            options = sorted(shorter.options(), key=_rank)
            if options:
                best = max(options, key=lambda each: each.settings.context_length)
                yield (
                    f"ask for less: one user's context of {best.settings.context_length:,} tokens "
                    f"fits in {best.mixture}"
                )
        yield f"have {_gib(need - there)} more memory, on a card to be fast{self._such_as(smallest, settings)}"
        yield "take a smaller model: `rigserve plan` without one names those that suit this rig"

    def _such_as(self, mixture: str, settings: Settings) -> str:
        """A card that would hold all of it, in words; nothing if there is none."""
        weights = self._subject.weights(mixture)
        on_card = memory_of(
            self._architecture, weights, settings, Offload((1.0,)), self._subject.extras
        ).cards[0]
        large = [
            card
            for card in catalog_cards()
            if not card.has_unified_memory
            and card.launch_price_usd is not None
            and card.memory_mib * MIB * _SHARE_FOR_ENGINES > on_card.total
        ]
        if not large:
            return ""
        best = min(large, key=lambda card: (card.memory_mib, -card.launch_year))
        return f"; one with {_gib(on_card.total)} for all of it, such as {best.name}, {best.memory_mib // 1024} GB"


def headroom_bytes(memory: Memory, rig: Rig) -> int:
    """What stays free where it is tightest; negative if it does not fit."""
    if rig.shares_memory:
        return rig.host.memory_bytes - memory.total.total
    rooms = (
        [rig.host.memory_bytes - memory.host.total]
        if memory.host.total > rig.host.memory_bytes
        else []
    )
    rooms += [
        card.memory_bytes - parts.total
        for card, parts in zip(rig.cards, memory.cards, strict=False)
    ]
    return min(rooms, default=rig.host.memory_bytes - memory.host.total)


def _watts(rig: Rig, offload: Offload) -> float:
    cards = rig.cards if offload.shares else ()
    if rig.shares_memory:
        return float(rig.cards[0].watts or _HOST_WATTS)
    return _HOST_WATTS + sum(_SHARE_OF_LIMIT * _limit(card) for card in cards)


def _limit(card: Device) -> float:
    return card.watts if card.watts is not None else 200.0


def _price_usd(rig: Rig) -> float | None:
    """The cards at their launch prices and a machine around them; None if some price is not known."""
    prices = [card.price_usd for card in rig.cards]
    if not prices or None in prices:
        return None
    total = sum(price for price in prices if price is not None)
    return total if rig.shares_memory else total + _HOST_USD


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
