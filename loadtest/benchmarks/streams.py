"""One streamed request: when each piece of text came, and what the server said it used."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Reply:
    """A stream as its client saw it; times are of ``time.perf_counter()``."""

    sent_at: float
    chunks_at: tuple[float, ...]
    text: str
    finish_reason: str | None
    usage: dict[str, Any]

    @property
    def ttft_seconds(self) -> float:
        """From sending to the first text."""
        return self.chunks_at[0] - self.sent_at

    @property
    def gaps_seconds(self) -> list[float]:
        """Between one piece of text and the next."""
        return [
            later - earlier
            for earlier, later in zip(self.chunks_at, self.chunks_at[1:], strict=False)
        ]

    @property
    def prompt_tokens(self) -> int:
        """As the server counted them."""
        return int(self.usage["prompt_tokens"])

    @property
    def completion_tokens(self) -> int:
        """As the server counted them."""
        return int(self.usage["completion_tokens"])

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not in the server's KV cache."""
        details = self.usage.get("prompt_tokens_details") or {}
        return self.prompt_tokens - int(details["cached_tokens"])


class Stream:
    """A request and what has come of it so far.

    While it runs only the clock is read: parsing waits for the end, as it would take time from a server
    on the same machine.
    """

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._url = url
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._sent_at = 0.0
        self._reads: list[tuple[float, bytes]] = []

    @property
    def answering(self) -> bool:
        """Whether anything has come."""
        return bool(self._reads)

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Send the request and read it to its end; raises ``RuntimeError`` when that fails."""
        self._sent_at = time.perf_counter()
        try:
            async with session.post(self._url, json=self._body) as answer:
                if answer.status != 200:
                    text = await answer.text()
                    raise RuntimeError(f"{self._url} answered {answer.status}: {text[:500]}")
                async for data in answer.content.iter_any():
                    self._reads.append((time.perf_counter(), data))
        except aiohttp.ClientError as error:
            raise RuntimeError(f"{self._url}: the stream broke off: {error}") from error

    def reply(self) -> Reply:
        """What has come so far; raises ``RuntimeError`` when the server reported an error."""
        chunks_at, texts = [], []
        finish_reason: str | None = None
        usage: dict[str, Any] = {}
        for at, event in self._events():
            if "error" in event:
                raise RuntimeError(f"{self._url}: {event['error']}")
            for choice in event.get("choices") or ():
                text = choice.get("text") or (choice.get("delta") or {}).get("content")
                if text:
                    chunks_at.append(at)
                    texts.append(text)
                finish_reason = choice.get("finish_reason") or finish_reason
            usage = event.get("usage") or usage
        return Reply(self._sent_at, tuple(chunks_at), "".join(texts), finish_reason, usage)

    def _events(self) -> Iterator[tuple[float, dict[str, Any]]]:
        rest = b""
        for at, data in self._reads:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    yield at, json.loads(line[len(b"data: ") :])
