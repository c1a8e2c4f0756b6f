"""An option as a config that serves it, with the predicted figures in comments."""

from __future__ import annotations

from serving.planner.memory import Memory
from serving.planner.options import Option, Plan
from serving.planner.published import awq_source_of, source_of
from serving.planner.quality import note_of
from serving.planner.render import where

_GIB = 2**30


class NoSource(Exception):
    """Nobody said where the model's file is; the message says how to."""


def config_text(plan: Plan, option: Option, *, source: str | None = None, title: str = "") -> str:
    """The YAML of a config for an option of a plan; raises :class:`NoSource`.

    ``source`` is where the model's file is, if that is neither published in a known place nor the model's own.
    """
    found, quantization = _source(plan, option, source)
    settings = option.settings
    keys: list[tuple[str, object]] = [("name", _served_name(plan.subject.name))]
    if option.engine != "llama_cpp":
        keys.append(("engine", option.engine))
    keys.append(("source", found))
    if quantization is not None:
        keys.append(("quantization", quantization))
    if option.engine == "vllm" and len(option.offload.shares) > 1:
        keys.append(("tensor_parallel", len(option.offload.shares)))
    keys += [("context_length", settings.context_length), ("max_sequences", settings.slots)]
    if settings.has_small_cache:
        keys.append(("kv_type", settings.key_type))
    if not option.offload.shares:
        keys.append(("devices", "[cpu]"))
    elif option.offload.layers is not None:
        keys.append(("gpu_layers", option.offload.layers))
    if option.offload.experts_on_cpu:
        keys.append(("extra_args", f"[--n-cpu-moe, '{option.offload.experts_on_cpu}']"))
    lines = [f"# {line}" for line in _comments(plan, option, title)]
    lines += ["", "models:"]
    for number, (key, value) in enumerate(keys):
        lines.append(f"  {'- ' if number == 0 else '  '}{key}: {value}")
    return "\n".join(lines) + "\n"


def _source(plan: Plan, option: Option, source: str | None) -> tuple[str, str | None]:
    if option.engine == "vllm":
        if option.mixture == "AWQ":
            return source or str(awq_source_of(plan.subject.name)), None
        return source or f"hf://{plan.subject.repo}", "fp8" if option.mixture == "FP8" else None
    if source is not None:
        return source, option.mixture if plan.subject.known_weights is None else None
    if plan.subject.source is not None:
        return plan.subject.source, None
    published = source_of(plan.subject.name, option.mixture)
    if published is None:
        raise NoSource(
            f"no GGUF file of {plan.subject.name} as {option.mixture} is known; say where one is with "
            "--source hf://ORG/REPO/FILE.gguf, which is requantized if it is another type"
        )
    return published


def _served_name(name: str) -> str:
    """What clients ask for: a file goes without its folder and ending."""
    return name.rpartition("/")[2].removesuffix(".gguf")


def _comments(plan: Plan, option: Option, title: str) -> list[str]:
    speed = option.speed
    users = "one user" if speed.users == 1 else f"each of {speed.users} users"
    low, high = 1 - speed.uncertainty, 1 + speed.uncertainty
    lines = [title] if title else []
    lines += [
        f"Written by `rigserve plan`: {plan.subject.name}, {option.mixture} ({note_of(option.mixture)}), "
        f"for {plan.rig.name}.",
        f"Predicted (docs/planning.md), {where(option)}: {_memory(option.memory)}; "
        f"{option.headroom_bytes / _GIB:.1f} GiB stay free.",
        f"{low * speed.one_user:,.0f} to {high * speed.one_user:,.0f} tok/s for one user"
        + (
            f", {low * speed.all_users:,.0f} to {high * speed.all_users:,.0f} for {speed.users} together"
            if speed.users > 1
            else ""
        )
        + f"; prompts {low * speed.prefill:,.0f} to {high * speed.prefill:,.0f} tok/s.",
        f"About {option.watts:.0f} W and ${option.usd_per_million:.2f} per million generated tokens, "
        f"with {users} at work all the time it is used.",
    ]
    return lines


def _memory(memory: Memory) -> str:
    words = [f"{memory.host.total / _GIB:.1f} GiB of main memory"]
    for number, parts in enumerate(memory.cards):
        card = "the card" if len(memory.cards) == 1 else f"card {number}"
        words.insert(
            number,
            f"{parts.total / _GIB:.1f} GiB of {card} (weights {parts.weights / _GIB:.1f}, "
            f"cache {parts.cache / _GIB:.1f}, work {parts.compute / _GIB:.1f})",
        )
    return ", ".join(words)
