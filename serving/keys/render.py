"""Keys as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from serving.keys.key import Allowance, Key

_MOMENTS = ("created_at", "expires_at", "revoked_at", "last_used_at")
_COLUMNS = ("NAME", "STATE", "TENANT", "MODELS", "LIMITS", "USED (UTC)")


def keys_table(keys: Sequence[Key], now_unix: float) -> Table:
    """Each key in a row that 80 columns can show: what they cannot is folded, nothing is cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column == "LIMITS")
    for key in keys:
        cells = (
            f"{key.name} (admin)" if key.is_admin else key.name,
            key.state(now_unix),
            _tenant_text(key),
            "all" if key.models is None else "\n".join(key.models),
            _limits_text(key.allowance),
            moment_text(key.last_used_at).removesuffix(" UTC"),
        )
        table.add_row(*map(Text, cells))
    return table


def key_table(told: Mapping[str, Any]) -> Table:
    """Everything about a key, as :meth:`Key.to_json` tells it."""
    table = Table(box=box.SIMPLE, show_header=False)
    has_budget = told["budget_usd"] is not None or told["budget_tokens"] is not None
    left_out = {"object"} if has_budget else {"object", "budget_period"}
    for name, value in told.items():
        if name not in left_out and value is not None:
            text = moment_text(value) if name in _MOMENTS else _value_text(value)
            table.add_row(Text(name), Text(text))
    return table


def _tenant_text(key: Key) -> str:
    """The tenant, and what is unusual about it."""
    weight = "" if key.weight == 1 else f", weight {key.weight:g}"
    return f"{key.tenant}{weight}" + (", batch" if key.priority == "batch" else "")


def _limits_text(limits: Allowance) -> str:
    given = (
        (limits.requests_per_minute, "{:,} req/min"),
        (limits.tokens_per_minute, "{:,} tok/min"),
        (limits.max_concurrent, "{:,} at once"),
        (limits.budget_usd, "${:,g}/" + limits.budget_period),
        (limits.budget_tokens, "{:,} tok/" + limits.budget_period),
    )
    return "\n".join(form.format(value) for value, form in given if value is not None) or "none"


def _value_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def moment_text(unix: float | None) -> str:
    """A moment for people, to the minute; "-" for none."""
    return "-" if unix is None else datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")
