"""An engine that computes nothing: it answers chats as fast as one core can write.

    python -m loadtest.benchmarks.gateway.engine PORT [CORE [TURN_SECONDS]]

A stream has ``max_tokens`` chunks of text, each written by itself, in turns with the other streams, as fast as
can be or one turn each ``TURN_SECONDS`` (after a CORE, or ``-``); asked to ``wait``, it stays open after the first. Uses nothing of serving's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys

import uvloop

WAIT = "wait"
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_HEADING = {"id": "chatcmpl-0123456789abcdef", "created": 1700000000, "model": "fake-0"}
_TIMINGS = dict.fromkeys(
    ("queue_seconds", "prefill_seconds", "decode_seconds", "prefill_busy_seconds",
     "decode_busy_seconds"), 0.001,
)  # fmt: skip


def _event(choices: list[dict[str, object]], **more: object) -> bytes:
    payload = {**_HEADING, "object": "chat.completion.chunk", "choices": choices, **more}
    data = b"data: " + json.dumps(payload, separators=(",", ":")).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> list[dict[str, object]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]


_BEGIN = _STREAM_HEAD + _event(_choice({"role": "assistant", "content": ""}))
_TEXT = _event(_choice({"content": " token"}))


def _usage(tokens: int) -> dict[str, object]:
    cached = {"cached_tokens": 0}
    return {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens,
            "prompt_tokens_details": cached}  # fmt: skip


def _end(tokens: int) -> bytes:
    last = _event(_choice({}, "length"))
    used = _event([], usage=_usage(tokens), timings=_TIMINGS)
    return last + used + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def _whole(status: str, payload: dict[str, object]) -> bytes:
    data = json.dumps(payload, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def _answer(tokens: int) -> bytes:
    message = {"role": "assistant", "content": " token" * tokens}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    payload = {**_HEADING, "object": "chat.completion", "choices": [choice]}
    return _whole("200 OK", {**payload, "usage": _usage(tokens), "timings": _TIMINGS})


class _Pump:
    """Writes one chunk to each open stream in every turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop, turn_seconds: float) -> None:
        self._loop = loop
        self._turn_seconds = turn_seconds
        self._next_at = 0.0
        self._streams: set[_Connection] = set()

    def add(self, stream: _Connection) -> None:
        """Begin, or go on, with a stream."""
        if not self._streams:
            self._next_at = self._loop.time() + self._turn_seconds
            self._loop.call_at(self._next_at, self._turn)
        self._streams.add(stream)

    def remove(self, stream: _Connection) -> None:
        """Stop with a stream, if it is under way."""
        self._streams.discard(stream)

    def _turn(self) -> None:
        for stream in tuple(self._streams):
            stream.write_next()
        if not self._streams:
            return
        if self._turn_seconds:
            self._next_at = max(self._next_at + self._turn_seconds, self._loop.time())
            self._loop.call_at(self._next_at, self._turn)
        else:
            self._loop.call_soon(self._turn)


class _Connection(asyncio.Protocol):
    def __init__(self, pump: _Pump) -> None:
        self._pump = pump
        self._received = b""
        self._tokens = 0
        self._left: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._left = None
        self._pump.remove(self)

    def pause_writing(self) -> None:
        self._pump.remove(self)

    def resume_writing(self) -> None:
        if self._left is not None:
            self._pump.add(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        declared = _LENGTH.search(head)
        length = int(declared[1]) if declared else 0
        if found and len(body) >= length:
            self._received = body[length:]
            self._take(head, body[:length])

    def _take(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"POST /v1/chat/completions"):
            self._transport.write(_whole("200 OK", {}))
            return
        asked = json.loads(body)
        self._tokens = asked["max_tokens"]
        if not asked.get("stream"):
            self._transport.write(_answer(self._tokens))
        elif asked["messages"][-1]["content"] == WAIT:
            self._transport.write(_BEGIN + _TEXT)
        else:
            self._transport.write(_BEGIN)
            self._left = self._tokens
            self._pump.add(self)

    def write_next(self) -> None:
        """One chunk of text, or the end."""
        assert self._left is not None
        if self._left:
            self._left -= 1
            self._transport.write(_TEXT)
        else:
            self._left = None
            self._pump.remove(self)
            self._transport.write(_end(self._tokens))


async def _serve(port: int, turn_seconds: float) -> None:
    loop = asyncio.get_running_loop()
    pump = _Pump(loop, turn_seconds)
    server = await loop.create_server(lambda: _Connection(pump), "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2] != "-":
        os.sched_setaffinity(0, {int(sys.argv[2])})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        turn_seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
        runner.run(_serve(int(sys.argv[1]), turn_seconds))
