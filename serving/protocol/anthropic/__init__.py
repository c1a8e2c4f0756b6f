"""Anthropic's Messages API, in terms of chat completions: every engine that has those has it."""

from serving.protocol.anthropic.answer import MessageTranslation, error_json
from serving.protocol.anthropic.request import CountTokensRequest, MessagesRequest

__all__ = ["CountTokensRequest", "MessageTranslation", "MessagesRequest", "error_json"]
