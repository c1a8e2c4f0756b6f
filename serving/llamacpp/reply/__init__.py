"""From generated text to the parts of a chat message: content, reasoning and tool calls."""

from serving.llamacpp.reply.deltas import ContentDelta, ReasoningDelta, ReplyDelta, ToolCallDelta
from serving.llamacpp.reply.formats import ReplyFormat, recognise
from serving.llamacpp.reply.parser import ReplyParser

__all__ = [
    "ContentDelta",
    "ReasoningDelta",
    "ReplyDelta",
    "ReplyFormat",
    "ReplyParser",
    "ToolCallDelta",
    "recognise",
]
