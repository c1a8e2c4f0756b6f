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
_COLUMNS = ("name", "id", "state", "tenant", "weight", "class", "models", "limits", "last used")


def keys_table(keys: Sequence[Key], now_unix: float) -> Table:
    """A line for each key."""
    table = Table(*_COLUMNS, box=box.SIMPLE)
    for key in keys:
        cells = (
            f"{key.name} (admin)" if key.is_admin else key.name,
            key.id,
            key.state(now_unix),
            key.tenant,
            f"{key.weight:g}",
            key.priority,
            "all" if key.models is None else ", ".join(key.models),
            _limits_text(key.allowance),
            _moment_text(key.last_used_at),
        )
        table.add_row(*map(Text, cells))
    return table


def key_table(told: Mapping[str, Any]) -> Table:
    """Everything about a key, as :meth:`Key.to_json` tells it."""
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in told.items():
        if name != "object" and value is not None:
            text = _moment_text(value) if name in _MOMENTS else _value_text(value)
            table.add_row(Text(name), Text(text))
    return table


def _limits_text(limits: Allowance) -> str:
    given = (
        (limits.requests_per_minute, "{:,} requests/min"),
        (limits.tokens_per_minute, "{:,} tokens/min"),
        (limits.max_concurrent, "{:,} at once"),
        (limits.budget_usd, "${:,g}/" + limits.budget_period),
        (limits.budget_tokens, "{:,} tokens/" + limits.budget_period),
    )
    return ", ".join(form.format(value) for value, form in given if value is not None) or "none"


def _value_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _moment_text(unix: float | None) -> str:
    return "-" if unix is None else datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")
