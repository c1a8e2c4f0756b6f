"""What the gateway reads of a stream it relays: as little as metering needs."""

from __future__ import annotations

from typing import Any

import orjson

from serving.protocol.sse import DONE

_END = b"\n\n"
_USAGE = b'"usage":{'
_ERROR = b'data: {"error"'
# Inside a JSON string the quotes would be escaped: generated text cannot look like these.
_UNFINISHED = b'"finish_reason":null'
_ROLE = b'"delta":{"role"'


class StreamTap:
    """Takes an engine's bytes as they arrive, gives back what the client gets.

    Only whole events pass. The event with the request's usage is parsed and, unless the client asked
    for it, kept back; so is the one that ends the stream (``finished``), before which something may be
    left to say. All others go through untouched and unread.
    """

    def __init__(self, *, forward_usage: bool) -> None:
        self._forward_usage = forward_usage
        self._rest = b""
        self.text_events = 0
        self.finished = False
        self.failed = False
        self.final: dict[str, Any] | None = None

    def fail(self) -> None:
        """Its engine has failed over the stream."""
        self.failed = True

    def feed(self, data: bytes) -> bytes:
        """The complete events among what has arrived so far."""
        data = self._rest + data
        cut = data.rfind(_END) + len(_END)
        if cut < len(_END):
            self._rest = data
            return b""
        complete, self._rest = data[:cut], data[cut:]
        self.text_events += complete.count(_UNFINISHED) - complete.count(_ROLE)
        if complete.endswith(DONE):
            self.finished = True
            complete = complete.removesuffix(DONE)
        if _ERROR in complete:
            self.failed |= any(event.startswith(_ERROR) for event in complete.split(_END))
        if _USAGE in complete:
            return b"".join(map(self._inspect, complete.split(_END)[:-1]))
        return complete

    def _inspect(self, event: bytes) -> bytes:
        if _USAGE in event and event.startswith(b"data: {"):
            try:
                payload = orjson.loads(event[len(b"data: ") :])
            except orjson.JSONDecodeError:
                payload = {}  # the client sees for itself what the engine wrote
            if isinstance(payload.get("usage"), dict) and not payload.get("choices"):
                self.final = payload
                if not self._forward_usage:
                    return b""
        return event + _END
