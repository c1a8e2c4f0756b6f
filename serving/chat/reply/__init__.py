"""From generated text to the parts of a chat message: content, reasoning and tool calls."""

from serving.chat.reply.deltas import ContentDelta, ReasoningDelta, ReplyDelta, ToolCallDelta
from serving.chat.reply.formats import ReplyFormat, recognise
from serving.chat.reply.parser import ReplyParser

__all__ = [
    "ContentDelta",
    "ReasoningDelta",
    "ReplyDelta",
    "ReplyFormat",
    "ReplyParser",
    "ToolCallDelta",
    "recognise",
]
