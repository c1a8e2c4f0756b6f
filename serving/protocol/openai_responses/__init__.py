"""OpenAI's Responses API, in terms of chat completions: every engine that has those has it."""

from serving.protocol.openai_responses.answer import begun
from serving.protocol.openai_responses.items import Item, numbered, reference_of
from serving.protocol.openai_responses.names import own_name
from serving.protocol.openai_responses.request import (
    InputItemsQuery,
    ResponseRequest,
    RetrieveQuery,
)
from serving.protocol.openai_responses.translation import ResponseTranslation

__all__ = [
    "InputItemsQuery",
    "Item",
    "ResponseRequest",
    "ResponseTranslation",
    "RetrieveQuery",
    "begun",
    "numbered",
    "own_name",
    "reference_of",
]
