"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from serving.models.catalog import Use
from serving.planner.choosing import Choice
from serving.planner.memory import Parts
from serving.planner.options import Option, Plan
from serving.planner.quality import loss_text, note_of
from serving.planner.rig import Rig

_BAR_CELLS = 16
# The parts of memory, in the order of Parts, with their colours.
_COLOURS = {
    "weights": "blue",
    "cache": "magenta",
    "compute": "yellow",
    "extras": "cyan",
    "overhead": "bright_black",
}
_GIB = 2**30
_MOST_ROWS = 12


def render(plan: Plan, *, show_all: bool = False) -> RenderableType:
    """The table, the recommendation, and what the figures are."""
    if not plan.options:
        return Group(
            Text(f"{plan.subject.name} does not fit on {plan.rig.name}.", style="bold"),
            *(Text(f"  - {line}") for line in plan.advice),
        )
    shown = plan.options if show_all else plan.options[:_MOST_ROWS]
    hidden = len(plan.options) - len(shown)
    return Group(
        _heading(plan),
        _table(plan, shown),
        _legend(),
        Text(),
        Text.assemble(("Take ", "bold"), f"{plan.reason}."),
        Text(_notes(plan) + (f" {hidden} more with --all." if hidden else ""), style="dim"),
    )


def _heading(plan: Plan) -> Text:
    architecture = plan.subject.architecture
    parameters, active = architecture.parameters / 1e9, architecture.active_parameters / 1e9
    experts = "" if parameters < 1.02 * active else f", {active:.3g} B active"
    return Text.assemble(
        (plan.subject.name, "bold"),
        f" ({parameters:.3g} B parameters{experts}) on ",
        (plan.rig.name, "bold"),
        f", {_rig_memory(plan.rig)}",
    )


def _rig_memory(rig: Rig) -> str:
    cards = sum(card.memory_bytes for card in rig.cards)
    host = f"{rig.host.memory_bytes / _GIB:.0f} GiB of main memory"
    if not rig.cards or rig.shares_memory:
        return f"{host} for engines"
    assumed = " (assumed)" if rig.is_assumed else ""
    return f"{cards / _GIB:.1f} GiB for engines, {host}{assumed}"


def _table(plan: Plan, options: tuple[Option, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_lines=False)
    for heading, justify in (
        ("", "left"),
        ("type, loss\nwhere", "left"),
        ("users x\ncontext", "right"),
        ("memory\nGiB taken, free", "left"),
        ("one user\ntok/s, TTFT", "right"),
        ("all\ntok/s", "right"),
        ("$/M tok\nwatts", "right"),
    ):
        table.add_column(heading, justify=cast(JustifyMethod, justify), no_wrap=True)
    for number, option in enumerate(options):
        table.add_row(*_cells(plan, option), style="" if option.meets_wishes else "dim")
        if number == 0:
            table.add_section()
    return table


def _cells(plan: Plan, option: Option) -> list[RenderableType]:
    speed = option.speed
    first = speed.first_token_seconds(plan.wishes.prompt_tokens)
    engine = "" if option.engine == "llama_cpp" else f"\n{option.engine}"
    return [
        Text("*" if option is plan.options[0] else "", style="bold green"),
        Text.assemble(
            (option.mixture, "bold"),
            f" {loss_text(option.mixture)}",
            (f"\n{where(option)}{engine}", "dim"),
        ),
        f"{speed.users} x\n{option.settings.context_length:,}"
        + (f"\ncache {option.settings.key_type}" if option.settings.has_small_cache else ""),
        _memory_bar(plan.rig, option),
        f"{_figure(speed.one_user)}\n{first:.2g} s",
        _figure(speed.all_users),
        f"{option.usd_per_million:.2f}\n{option.watts:.0f}",
    ]


def where(option: Option) -> str:
    """On which devices the model is, in a few words."""
    offload = option.offload
    if not offload.shares:
        return "processor"
    if offload.experts_on_cpu:
        count = offload.experts_on_cpu
        return f"experts of {count} in RAM"
    if offload.layers is not None:
        return f"{offload.layers} layers on card"
    return "card" if len(offload.shares) == 1 else f"{len(offload.shares)} cards"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _memory_bar(rig: Rig, option: Option) -> Text:
    """For each kind of device a bar of what there is, and under it what is taken and what stays free."""
    memory = option.memory
    if rig.shares_memory or not option.offload.shares:
        return _bar(memory.total, rig.host.memory_bytes)
    cards = sum(memory.cards, Parts())
    lines = _bar(cards, sum(card.memory_bytes for card in rig.cards))
    if option.is_split:
        lines = Text.assemble(lines, "\n", _bar(memory.host, rig.host.memory_bytes), " RAM")
    return lines


def _bar(parts: Parts, available_bytes: int) -> Text:
    bar, filled, used_cells = Text(), 0.0, 0
    for name, colour in _COLOURS.items():
        filled += getattr(parts, name) / max(available_bytes, 1) * _BAR_CELLS
        cells = min(round(filled), _BAR_CELLS) - used_cells
        bar.append("█" * cells, style=colour)
        used_cells += cells
    bar.append("░" * (_BAR_CELLS - used_cells), style="dim")
    free_bytes = available_bytes - parts.total
    bar.append(f"\n{parts.total / _GIB:.1f}, {free_bytes / _GIB:.1f}")
    return bar


def _legend() -> Text:
    legend = Text("memory: ", style="dim")
    for name, colour in _COLOURS.items():
        legend.append("█ ", style=colour)
        legend.append(f"{name}  ", style="dim")
    return legend


def _notes(plan: Plan) -> str:
    best = plan.options[0]
    uncertain = f"{best.speed.uncertainty:.0%}"
    prompt = plan.wishes.prompt_tokens
    return (
        f"All of this is estimated: memory is an upper bound, speeds are +/- {uncertain} (docs/planning.md). "
        f"TTFT: of a prompt of {prompt:,} tokens, alone. Loss: how much higher the perplexity of Llama 3 8B is than in 16 bits. "
        "$: generated tokens, all users at work, hardware and energy as in the config's cost section"
        + (", cards at their launch prices." if plan.rig.cards else ".")
    )


def render_choices(found: Mapping[Use, Sequence[Choice]], rig: Rig) -> RenderableType:
    """A table for each use, and what the choice rests on."""
    parts: list[RenderableType] = [
        Text.assemble("Models for ", (rig.name, "bold"), f", {_rig_memory(rig)}")
    ]
    for use, listed in found.items():
        parts.append(_choices_table(use, listed))
    parts.append(
        Text(
            "The largest that run well, newer ones counted for more; nobody has measured here how good their answers "
            "are. All figures are estimated (docs/planning.md). `rigserve plan MODEL` has more of each.",
            style="dim",
        )
    )
    return Group(*parts)


def _choices_table(use: str, listed: Sequence[Choice]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(use, overflow="fold", min_width=30)
    table.add_column("type,\nwhere", no_wrap=True)
    for heading in ("context", "GiB", "tok/s", "$/M\ntok", "since"):
        table.add_column(heading, justify="right", no_wrap=True)
    for choice in listed:
        option = choice.option
        table.add_row(
            choice.model.name,
            Text.assemble(option.mixture, (f"\n{where(option)}", "dim")),
            f"{option.settings.context_length:,}",
            f"{option.memory.total.total / _GIB:.1f}",
            _figure(option.speed.one_user),
            f"{option.usd_per_million:.2f}",
            choice.model.released,
        )
    if not listed:
        table.add_row(Text("none runs well", style="dim"))
    return table


def choices_json(found: Mapping[Use, Sequence[Choice]], rig: Rig) -> dict[str, Any]:
    """The choices for programs; sizes are bytes, speeds tokens a second, all of it estimated."""
    return {
        "rig": rig.name,
        "estimated": True,
        "choices": {
            use: [
                {
                    "model": choice.model.name,
                    "quantization": choice.option.mixture,
                    "engine": choice.option.engine,
                    "context_length": choice.option.settings.context_length,
                    "memory_bytes": choice.option.memory.total.total,
                    "tokens_per_second_one_user": round(choice.option.speed.one_user, 2),
                    "usd_per_million_tokens": round(choice.option.usd_per_million, 4),
                    "released": choice.model.released,
                }
                for choice in listed
            ]
            for use, listed in found.items()
        },
    }


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan for programs; sizes are bytes, speeds tokens a second, all of it estimated."""
    return {
        "model": plan.subject.name,
        "rig": plan.rig.name,
        "fits": bool(plan.options),
        "reason": plan.reason,
        "advice": list(plan.advice),
        "estimated": True,
        "options": [_option_json(option, plan) for option in plan.options],
    }


def _option_json(option: Option, plan: Plan) -> dict[str, Any]:
    speed = option.speed
    return {
        "quantization": option.mixture,
        "quality": note_of(option.mixture),
        "engine": option.engine,
        "context_length": option.settings.context_length,
        "kv_type": option.settings.key_type,
        "users": speed.users,
        "gpu_layers": option.offload.layers,
        "experts_on_cpu": option.offload.experts_on_cpu,
        "memory_bytes": {
            "host": _parts_json(option.memory.host),
            "cards": [_parts_json(parts) for parts in option.memory.cards],
        },
        "headroom_bytes": option.headroom_bytes,
        "tokens_per_second_one_user": round(speed.one_user, 2),
        "tokens_per_second_all_users": round(speed.all_users, 2),
        "prefill_tokens_per_second": round(speed.prefill, 1),
        "first_token_seconds": round(speed.first_token_seconds(plan.wishes.prompt_tokens), 4),
        "uncertainty": speed.uncertainty,
        "watts": round(option.watts),
        "usd_per_million_tokens": round(option.usd_per_million, 4),
        "meets_wishes": option.meets_wishes,
    }


def _parts_json(parts: Parts) -> dict[str, int]:
    return asdict(parts) | {"total": parts.total}
