"""This API's names for what chat completions' errors are about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What chat completions call the things that clients of this API have sent.
_NAMES = (
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("messages", "input"),
)
# Errors of which only these codes tell what is at fault.
_OF_THE_INPUT = ("context_length_exceeded",)


def own_name(param: str) -> str:
    """What a client of this API has sent as a chat completion's ``param``."""
    own = param.replace(".function.", ".") if param.startswith("tools") else param
    for chat_name, name in _NAMES:
        if own == chat_name or own.startswith((f"{chat_name}[", f"{chat_name}.")):
            # Messages and items do not correspond one to one.
            return name
    return own


def renamed(error: Mapping[str, Any]) -> dict[str, Any]:
    """An OpenAI error object with ``param`` and message about what the client of this API has sent."""
    param, message = error.get("param"), error.get("message") or ""
    if not isinstance(param, str):
        about = {"param": "input"} if error.get("code") in _OF_THE_INPUT else {}
        return {**error, **about}
    own = own_name(param)
    return {**error, "param": own, "message": message.replace(f"'{param}'", f"'{own}'")}
