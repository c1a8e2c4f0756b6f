"""How another API's answers are made of those to a chat completion."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import orjson

from serving.protocol.errors import ApiError

_log = logging.getLogger(__name__)

_NO_SENSE = ApiError(502, "The engine's stream makes no sense.", code="bad_engine_answer")
_DATA, _COMMENT, _END = b"data: ", b":", b"\n\n"


class Translation(Protocol):
    """One request's way back. Only the methods for what was asked for, whole or streamed, are called."""

    def answer(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole answer, from a chat completion's."""
        ...

    def refusal(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        """The body of an error response, from OpenAI's (``{"error": {...}}``)."""
        ...

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """The events, as bytes, that a stream's chunk brings; the one with the usage is the last."""
        ...

    def failure(self, error: dict[str, Any]) -> bytes:
        """The events that end a stream in which something went wrong."""
        ...

    def end(self) -> bytes:
        """The events that end a stream in the ordinary way."""
        ...


async def translated(
    chunks: AsyncGenerator[bytes, None], translation: Translation, on_nonsense: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    """A stream of whole events of a chat completion in the words of another API.

    Where it makes no sense it ends with an error, after ``on_nonsense``.
    """
    try:
        async for data in chunks:
            try:
                told = b"".join(_told(event, translation) for event in data.split(_END) if event)
            except (AttributeError, LookupError, TypeError, ValueError):
                _log.exception("an engine's stream makes no sense")
                on_nonsense()
                yield translation.failure(_NO_SENSE.body)
                return
            if told:
                yield told
    finally:
        await chunks.aclose()


def _told(event: bytes, translation: Translation) -> bytes:
    if event.startswith(_COMMENT):
        return event + _END
    data = event.removeprefix(_DATA)
    if data == b"[DONE]":
        return translation.end()
    payload: dict[str, Any] = orjson.loads(data)
    return translation.failure(payload) if "error" in payload else translation.chunk(payload)
