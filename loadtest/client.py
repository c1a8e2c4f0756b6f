"""A client of OpenAI's streaming API that reads the clock at every chunk."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from loadtest.records import RequestRecord

_READ_BYTES = 65536
_TIMEOUT_SECONDS = 600.0
# Where a delta may hold generated text; servers disagree about the name of reasoning.
_TEXT_KINDS = ("content", "reasoning_content", "reasoning", "tool_calls")


class ServerError(Exception):
    """The server cannot be used; the message is for the person who started the bench."""


class Client:
    """Requests to one server, one connection a user. ``base_url`` ends in ``/v1``."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"--url {base_url!r} is not of the form http://HOST:PORT/v1")
        self._host, self._port, self._tls = parts.hostname, parts.port, parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._connection: http.client.HTTPConnection | None = None

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is None:
            if self._tls:
                self._connection = http.client.HTTPSConnection(
                    self._host,
                    self._port,
                    timeout=_TIMEOUT_SECONDS,
                    context=ssl.create_default_context(),
                )
            else:
                self._connection = http.client.HTTPConnection(
                    self._host, self._port, timeout=_TIMEOUT_SECONDS
                )
        return self._connection

    def close(self) -> None:
        """Drop the connection; the next request opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def get(self, path: str, *, below_base: bool = True) -> bytes:
        """GET a path below the base URL, or below the server's root; raises :class:`ServerError`."""
        full = (self._path if below_base else self._path.removesuffix("/v1")) + path
        try:
            connection = self._connect()
            connection.request("GET", full, headers=self._headers)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            place = self._host if self._port is None else f"{self._host}:{self._port}"
            raise ServerError(
                f"cannot reach {place}: {error}; is the server running, and --url right?"
            ) from error
        if answer.status != 200:
            raise ServerError(
                f"GET {full} answered {answer.status}: {body[:200].decode(errors='replace')}"
            )
        return body

    def models(self) -> list[str]:
        """Names the server lists; raises :class:`ServerError`."""
        try:
            return [entry["id"] for entry in json.loads(self.get("/models"))["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError("GET /models did not answer as OpenAI's API does") from error

    def stream_chat(
        self, body: dict[str, Any], record: RequestRecord, clock: Callable[[], float]
    ) -> None:
        """Send a chat completion, read it to its end, and fill the record in."""
        try:
            connection = self._connect()
            payload = json.dumps(
                {**body, "stream": True, "stream_options": {"include_usage": True}}
            )
            connection.request(
                "POST", f"{self._path}/chat/completions", body=payload, headers=self._headers
            )
            answer = connection.getresponse()
            if answer.status != 200:
                record.error = f"http_{answer.status}"
                record.error_message = _message(answer.read())
            else:
                self._read_stream(answer, record, clock)
        except (OSError, http.client.HTTPException) as error:
            record.error, record.error_message = "connection", str(error) or type(error).__name__
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # Whatever shape a foreign server's events have, the request must be counted.
            record.error = "malformed_stream"
            record.error_message = f"an event is not of OpenAI's shape: {error}"
        record.ended_at = clock()
        if record.error:
            self.close()

    def _read_stream(
        self, answer: http.client.HTTPResponse, record: RequestRecord, clock: Callable[[], float]
    ) -> None:
        last_at: float | None = None
        done = False
        for data in sse_events(iter(lambda: answer.read1(_READ_BYTES), b"")):
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if error := event.get("error"):
                record.error = "stream_error"
                record.error_message = str(
                    error.get("message", error) if isinstance(error, dict) else error
                )
                return
            if _has_text(event):
                now = clock()
                if last_at is None:
                    record.first_token_at = now
                else:
                    record.chunk_gaps_seconds.append(now - last_at)
                last_at = now
            _note(event, record)
        if not done or record.finish_reason is None:
            record.error, record.error_message = "incomplete_stream", "the stream broke off"


def sse_events(reads: Iterator[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, however the bytes arrive."""
    rest = b""
    for data in reads:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].strip()


def _has_text(event: dict[str, Any]) -> bool:
    choices = event.get("choices")
    delta = (choices[0].get("delta") or {}) if choices else {}
    return any(delta.get(kind) for kind in _TEXT_KINDS)


def _note(event: dict[str, Any], record: RequestRecord) -> None:
    if choices := event.get("choices"):
        record.finish_reason = choices[0].get("finish_reason") or record.finish_reason
    if usage := event.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.completion_tokens = usage.get("completion_tokens")
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if timings := event.get("timings"):
        record.timings = timings


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", errors="replace")


def monotonic_since(start: float) -> Callable[[], float]:
    """A clock that counts seconds from ``start`` (of ``time.monotonic()``)."""
    return lambda: time.monotonic() - start
