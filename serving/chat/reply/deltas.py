"""The parts of a chat message, as they become certain while it is generated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a tool call: ``id`` and ``name`` come with its first delta only, ``arguments`` in pieces."""

    index: int
    id: str | None
    name: str | None
    arguments: str


ReplyDelta = ContentDelta | ReasoningDelta | ToolCallDelta
