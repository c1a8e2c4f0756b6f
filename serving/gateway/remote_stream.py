"""Other servers' streams, in the exact form in which the gateway reads those of its own engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from serving.protocol.sse import DONE, event

_LONGEST_EVENT_BYTES = 16 * 2**20


class CanonicalEvents:
    """Takes a server's bytes as they arrive, gives back whole events: compact JSON, LF, usage by itself at the end.

    Comments, event names and ids are left out, and what comes after the end. What is no JSON object goes on as it is.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._usage: dict[str, Any] | None = None
        # Whether the server said that this is the end.
        self.finished = False

    def feed(self, data: bytes) -> bytes:
        """The complete events among what has arrived so far; raises :class:`ValueError` for one without end."""
        *lines, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n")
        if len(self._rest) > _LONGEST_EVENT_BYTES:
            raise ValueError("a line of the stream does not end")
        # OpenAI's streams have one line of data in each event.
        return b"".join(
            self._told(line.removeprefix(b"data:").strip())
            for line in lines
            if line.startswith(b"data:")
        )

    def error(self, told: Any) -> Any:
        """What is told of an error that broke off the stream."""
        return told

    def revise(self, chunk: dict[str, Any]) -> None:
        """Change a chunk where a server's differ in more than their form."""

    def parts(self, chunk: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """The chunks that one of a server's is told as."""
        return (chunk,)

    def _told(self, data: bytes) -> bytes:
        if self.finished:
            return b""
        if data == b"[DONE]":
            self.finished = True
            usage = b"" if self._usage is None else event(self._usage)
            return usage + DONE
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return b"data: " + data + b"\n\n"
        if not isinstance(chunk, dict):
            return b"data: " + data + b"\n\n"
        # Some servers say in each chunk that there is none.
        if (error := chunk.pop("error", None)) is not None:
            # By its first key errors are told from chunks.
            return event({"error": self.error(error)})
        self.revise(chunk)
        choices = chunk.get("choices")
        if isinstance(choices, list):
            for choice in choices:
                if isinstance(choice, dict):
                    choice.setdefault("finish_reason", None)
        if isinstance(chunk.get("usage"), dict):
            self._usage = {**chunk, "choices": []}
            if not choices:
                return b""
            del chunk["usage"]
            chunk.pop("timings", None)
        return b"".join(map(event, self.parts(chunk)))
