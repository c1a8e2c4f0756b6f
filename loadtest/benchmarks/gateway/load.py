"""The clients: they send chats over connections that stay open, and look at no more of the answers than they must.

A client that parses is slower than what is measured here.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_CHUNK = b"data: {"
_STREAM_END = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server, the model it is asked for, and the key it asks for."""

    name: str
    root_url: str
    model: str
    key: str = "none"

    def chat(self, text: str = "Hello!", model: str | None = None, **fields: Any) -> bytes:
        """A request for a chat completion, as it goes over the wire."""
        messages = [{"role": "user", "content": text}]
        body = json.dumps({"model": model or self.model, "messages": messages, **fields}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(self.root_url).netloc}\r\n"
            f"authorization: Bearer {self.key}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


class Client(asyncio.Protocol):
    """One connection, one request at a time. ``chunks`` counts the events of all its streams."""

    def __init__(self) -> None:
        self.chunks = 0
        self.answers = 0
        self.first_chunk_at = 0.0
        # Set once the first event of a stream is there.
        self.streaming = asyncio.Event()
        self._tail = b""
        self._head: bytes | None = b""
        self._missing_bytes: int | None = None
        self._done: asyncio.Future[None] | None = None

    @staticmethod
    async def connect(target: Target) -> Client:
        """A connection to a server."""
        url = urlsplit(target.root_url)
        assert url.hostname is not None
        assert url.port is not None
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(Client, url.hostname, url.port)
        return client

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(RuntimeError("a connection broke off"))

    def close(self) -> None:
        """Hang up."""
        if self._done:
            self._done.cancel()
        self._transport.abort()

    def begin(self, request: bytes) -> asyncio.Future[None]:
        """Send a request; its future is done when the answer is complete. It fails with ``RuntimeError``."""
        self._head, self._tail, self._missing_bytes = b"", b"", None
        self.first_chunk_at = 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._done

    async def ttft_seconds(self, request: bytes) -> float:
        """From sending a request for a stream to the first event of it; reads it to its end."""
        sent_at = time.perf_counter()
        await self.begin(request)
        return self.first_chunk_at - sent_at

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            data = self._head = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                return
            if not data.startswith(b"HTTP/1.1 200"):
                self._fail(data)
                return
            if length := _LENGTH.search(data, 0, end):
                self._missing_bytes = int(length[1]) + end + 4
            self._head = None
        if self._missing_bytes is not None:
            self._missing_bytes -= len(data)
            if self._missing_bytes <= 0:
                self._complete()
            return
        seen = self._tail + data
        # What is kept is shorter than the mark: none is counted twice.
        found = seen.count(_CHUNK)
        if found and not self.first_chunk_at:
            self.first_chunk_at = time.perf_counter()
            self.streaming.set()
        self.chunks += found
        self._tail = seen[1 - len(_CHUNK) :]
        if seen.endswith(_STREAM_END):
            self._complete()

    def _complete(self) -> None:
        self.answers += 1
        if self._done and not self._done.done():
            self._done.set_result(None)

    def _fail(self, answer: bytes) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(RuntimeError(f"answered: {answer[:500]!r}"))


async def counts_per_second(
    target: Target, request: bytes, clients: int, warm_up_seconds: float, seconds: float
) -> tuple[float, float]:
    """Streamed chunks and complete answers per second, with so many clients that ask again and again.

    Raises ``RuntimeError`` when a request fails.
    """
    crowd = [await Client.connect(target) for _ in range(clients)]

    async def ask_again(client: Client) -> None:
        while True:
            await client.begin(request)

    def so_far() -> tuple[float, int, int]:
        counted = [(client.chunks, client.answers) for client in crowd]
        return time.perf_counter(), *map(sum, zip(*counted, strict=True))  # type: ignore[return-value]

    asking = [asyncio.create_task(ask_again(client)) for client in crowd]
    try:
        await _unless_ended(asking, warm_up_seconds)
        began_at, chunks, answers = so_far()
        await _unless_ended(asking, seconds)
        ended_at, more_chunks, more_answers = so_far()
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for client in crowd:
            client.close()
    elapsed = ended_at - began_at
    return (more_chunks - chunks) / elapsed, (more_answers - answers) / elapsed


async def open_idle(target: Target, requests: Sequence[bytes]) -> list[Client]:
    """A client for each request, whose streams have all begun; raises ``TimeoutError`` if one does not."""
    crowd = []
    for request in requests:
        client = await Client.connect(target)
        crowd.append(client)
        client.begin(request)
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await client.streaming.wait()
    return crowd


async def _unless_ended(tasks: Sequence[asyncio.Task[None]], seconds: float) -> None:
    ended, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in ended:
        task.result()
