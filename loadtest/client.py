"""A client of OpenAI's streaming API that does nothing but read while a stream runs.

Every read is stamped and kept as it came; HTTP's framing is undone in C. The events are parsed when the
stream has ended, a few at a time: parsing would make other streams' clocks late.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

from loadtest.records import RequestRecord

_READ_BYTES = 65536
_TIMEOUT_SECONDS = 600.0
# Where a delta may hold generated text; servers disagree about the name of reasoning.
_TEXT_KINDS = ("content", "reasoning_content", "reasoning", "tool_calls")
_EVENTS_AT_A_TIME = 100
_CLIENT_LIMITS = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS}


class ServerError(Exception):
    """The server cannot be used; the message is for the person who started the bench."""


class _BrokenAnswer(Exception):
    """The connection ended, or what came over it is not HTTP."""


class _Answer:
    """Takes an HTTP answer from the parser: its status, and its body as it was read."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.status = 0
        self.reads: list[tuple[float, bytes]] = []
        self.complete = False
        self.delimited = False  # by a length or by chunks, not by the connection's end
        self.now = 0.0
        self._clock = clock

    def on_header(self, name: bytes, _value: bytes) -> None:
        self.delimited |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, body: bytes) -> None:
        self.reads.append((self.now, body))

    def on_message_complete(self) -> None:
        self.complete = True

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.reads)


class Reply:
    """What a stream said: its text, and the tool calls that it asked for, as OpenAI writes them."""

    def __init__(self) -> None:
        self.text = ""
        self.tool_calls: list[dict[str, Any]] = []


class Client:
    """Requests to one server, one connection, one request at a time. ``base_url`` ends in ``/v1``."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"--url {base_url!r} is not of the form http://HOST:PORT/v1")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._head = (
            f"host: {parts.netloc.rpartition('@')[2]}\r\ncontent-type: application/json\r\n"
        )
        if api_key:
            self._head += f"authorization: Bearer {api_key}\r\n"
        self._socket: socket.socket | None = None

    def close(self) -> None:
        """Drop the connection; the next request opens a new one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def get(self, path: str, *, below_base: bool = True) -> bytes:
        """GET a path below the base URL, or below the server's root; raises :class:`ServerError`."""
        return self._whole("GET", path, None, below_base)

    def post(self, path: str, body: dict[str, Any], *, below_base: bool = True) -> dict[str, Any]:
        """POST JSON and take JSON; raises :class:`ServerError`."""
        try:
            answer = orjson.loads(self._whole("POST", path, body, below_base))
        except ValueError as error:
            raise ServerError(f"POST {path} did not answer with JSON") from error
        if not isinstance(answer, dict):
            raise ServerError(f"POST {path} did not answer with an object")
        return answer

    def _whole(
        self, method: str, path: str, body: dict[str, Any] | None, below_base: bool
    ) -> bytes:
        full = (self._path if below_base else self._path.removesuffix("/v1")) + path
        try:
            answer = self._exchange(method, full, body, time.monotonic)
        except (OSError, _BrokenAnswer) as error:
            self.close()
            raise ServerError(
                f"cannot reach {self._host}:{self._port}: {error}; is the server running, and --url right?"
            ) from error
        if answer.status != 200:
            raise ServerError(f"{method} {full} answered {answer.status}: {_message(answer.body)}")
        return answer.body

    def models(self) -> list[str]:
        """Names the server lists; raises :class:`ServerError`."""
        try:
            return [entry["id"] for entry in orjson.loads(self.get("/models"))["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError("GET /models did not answer as OpenAI's API does") from error

    def stream(
        self, path: str, body: dict[str, Any], record: RequestRecord, clock: Callable[[], float]
    ) -> Reply:
        """Send a completion or a chat, read it to its end, and fill the record in."""
        reply = Reply()
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        record.sent_at = clock()
        try:
            answer = self._exchange("POST", self._path + path, asked, clock)
            record.ended_at = clock()
            if answer.status != 200:
                record.error = f"http_{answer.status}"
                record.error_message = _message(answer.body)
            else:
                _take(answer.reads, record, reply)
                if answer.reads and record.error is None:
                    record.ended_at = answer.reads[-1][0]
        except _BrokenAnswer as error:
            record.ended_at = clock()
            record.error, record.error_message = "connection", str(error)
        except OSError as error:
            record.ended_at = clock()
            limited = error.errno in _CLIENT_LIMITS
            record.error = "client_limit" if limited else "connection"
            record.error_message = str(error) or type(error).__name__
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # Whatever shape a foreign server's events have, the request must be counted.
            record.error = "malformed_stream"
            record.error_message = f"an event is not of OpenAI's shape: {error}"
        if record.error:
            self.close()
        return reply

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None, clock: Callable[[], float]
    ) -> _Answer:
        payload = b"" if body is None else orjson.dumps(body)
        head = f"{method} {path} HTTP/1.1\r\n{self._head}content-length: {len(payload)}\r\n\r\n"
        connection = self._connection()
        connection.sendall(head.encode("latin-1") + payload)
        answer = _Answer(clock)
        parser = httptools.HttpResponseParser(answer)
        try:
            while not answer.complete:
                data = connection.recv(_READ_BYTES)
                answer.now = clock()
                if not data:
                    break
                parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise _BrokenAnswer(f"not an HTTP answer: {error}") from error
        answer.status = parser.get_status_code()
        if not answer.complete and (answer.delimited or not answer.status):
            # Of a stream that broke off, what came before its end is kept: it says more than this would.
            if not answer.reads:
                raise _BrokenAnswer("the server hung up")
            self.close()
        elif not parser.should_keep_alive():
            self.close()
        return answer

    def _connection(self) -> socket.socket:
        """The open connection, or a new one if the server has hung up on it."""
        if self._socket is not None and _readable(self._socket):
            self.close()
        if self._socket is None:
            self._socket = socket.create_connection((self._host, self._port), _TIMEOUT_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                self._socket = _tls().wrap_socket(self._socket, server_hostname=self._host)
        return self._socket


def _readable(connection: socket.socket) -> bool:
    """Whether something has come though nothing was asked for: the end."""
    poll = select.poll()  # unlike select(), of any number of files
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def sse_events(reads: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, however the bytes arrived, with the moment it was complete."""
    rest = b""
    for at, data in reads:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line[len(b"data:") :].strip()


def _take(reads: list[tuple[float, bytes]], record: RequestRecord, reply: Reply) -> None:
    """Fill a record in from a stream that has ended."""
    last_at: float | None = None
    done = False
    lengths: list[int] = []
    texts: list[str] = []
    for number, (at, data) in enumerate(sse_events(reads)):
        if number % _EVENTS_AT_A_TIME == _EVENTS_AT_A_TIME - 1:
            time.sleep(0)  # lets other streams read
        if data == b"[DONE]":
            done = True
            continue
        event = orjson.loads(data)
        if error := event.get("error"):
            record.error = "stream_error"
            record.error_message = str(
                error.get("message", error) if isinstance(error, dict) else error
            )
            return
        if length := _take_text(event, texts, reply):
            lengths.append(length)
            if last_at is None:
                record.first_token_at = at
            else:
                record.chunk_gaps_seconds.append(at - last_at)
            last_at = at
        _note(event, record)
    reply.text = "".join(texts)
    if not done or record.finish_reason is None:
        record.error, record.error_message = "incomplete_stream", "the stream broke off"
    if record.completion_tokens and lengths and len(lengths) != record.completion_tokens:
        share = record.completion_tokens / sum(lengths)
        record.chunk_tokens = [length * share for length in lengths]


def _take_text(event: dict[str, Any], texts: list[str], reply: Reply) -> int:
    """Keep the text of an event; returns how long it was, of whatever kind."""
    choices = event.get("choices")
    if not choices:
        return 0
    choice = choices[0]
    if text := choice.get("text"):  # a completion's
        texts.append(text)
        return len(text)
    delta = choice.get("delta") or {}
    length = 0
    for kind in _TEXT_KINDS:
        if value := delta.get(kind):
            if kind == "content":
                texts.append(value)
            elif kind == "tool_calls":
                _take_calls(value, reply)
            length += len(value if isinstance(value, str) else orjson.dumps(value))
    return length


def _take_calls(pieces: list[dict[str, Any]], reply: Reply) -> None:
    for piece in pieces:
        function = piece.get("function") or {}
        if piece.get("id"):
            reply.tool_calls.append(
                {
                    "id": piece["id"],
                    "type": "function",
                    "function": {"name": function.get("name") or "", "arguments": ""},
                }
            )
        if reply.tool_calls:
            reply.tool_calls[-1]["function"]["arguments"] += function.get("arguments") or ""


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
        return str(orjson.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", errors="replace")
