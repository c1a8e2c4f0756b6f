"""The HTTP server: uvicorn's, with limits on what clients may hold without asking for anything.

A connection has until ``header_timeout_seconds`` for each request's head, and is closed when its client does
not take what it asked for. Who has too many connections gets no more.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from ssl import SSLContext
from types import FrameType
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.config import ServerConfig
from serving.protocol.errors import ApiError

# What every response says to browsers: take its type as told, show it in no frame, tell no one where you were.
SECURITY_HEADERS = (
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", "frame-ancestors 'none'"),
    ("referrer-policy", "no-referrer"),
)
_IPV6_NETWORK_BITS = 64
# This machine's own addresses, as whatever kind of socket tells them: proxies there are believed whom they speak for.
_PROXIES = ("127.0.0.0/8", "::1", "::ffff:127.0.0.0/104")
# To those who find all connections taken.
_RETRY_AFTER_SECONDS = 1

_log = logging.getLogger("rigserve.access")


class HttpServer(uvicorn.Server):
    """uvicorn, but signals begin a drain instead of closing the listener: new requests get an answer.

    With ``tls`` it speaks HTTPS only.
    """

    def __init__(
        self,
        app: object,
        limits: ServerConfig,
        on_signal: Callable[[int], object],
        tls: SSLContext | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=functools.partial(_Connection, limits=limits, clients=Counter()),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            headers=list(SECURITY_HEADERS),
            forwarded_allow_ips=os.environ.get("FORWARDED_ALLOW_IPS", ",".join(_PROXIES)),
            timeout_keep_alive=limits.idle_timeout_seconds,  # type: ignore[arg-type]
            timeout_graceful_shutdown=1,
        )
        config.load()
        config.ssl = tls
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn on SIGINT and SIGTERM."""
        self._on_signal(signal.Signals(sig))


class _Connection(HttpToolsProtocol):
    """One client's connection, with its deadlines."""

    def __init__(
        self, *args: Any, limits: ServerConfig, clients: Counter[str], **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self._limits = limits
        # Open connections by network of the client, of all the server's.
        self._clients = clients
        self._network = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._write_check: asyncio.TimerHandle | None = None
        self._reading_head = True
        self._reading_body = False
        # What has arrived since the last whole request, and what of a head is parsed.
        self._head_bytes = 0
        self._parsed_bytes = 0
        self._refusal: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._network = _network_of(self.client[0]) if self.client else ""
        self._clients[self._network] += 1
        if len(self.connections) > self._limits.max_connections:
            self._refuse(_too_many(503, "server", "server.max_connections"))
        elif (
            self._network
            and self._clients[self._network] > self._limits.max_connections_per_address
        ):
            self._refuse(_too_many(429, "address", "server.max_connections_per_address"))
        else:
            self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clients[self._network] -= 1
        if not self._clients[self._network]:
            del self._clients[self._network]
        self._no_deadline()
        self._no_write_check()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._reading_head:
            self._head_bytes += len(data)
            self._await_more()
        super().data_received(data)
        # The parser keeps an unfinished name or value, and tells nobody how long it is by now.
        if self._reading_head and self._head_bytes > self._limits.max_header_bytes:
            self._refuse(self._head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._parsed_bytes = 0
        self._await_more()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value))
        if len(self.headers) > self._limits.max_headers:
            self._stop(self._head_too_large())

    def on_headers_complete(self) -> None:
        self._no_deadline()
        self._reading_head = False
        self._reading_body = True
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading_head = True
        self._reading_body = False
        if self.cycle.response_complete:
            self._no_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading_body or self._head_bytes:
            # It was answered without what is still to come, which may not come for ever.
            self._await_more()
        if self.transport.is_closing():
            self._check_writes()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no HTTP, and for what was stopped while it was parsed."""
        self._refuse(self._refusal or ApiError(400, msg, code="invalid_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._no_write_check()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._check_writes()

    def shutdown(self) -> None:
        super().shutdown()
        self._no_deadline()

    @property
    def _is_answering(self) -> bool:
        return (
            self.cycle is not None
            and self.cycle.response_started
            and not self.cycle.response_complete
        )

    def _count(self, size_bytes: int) -> None:
        """Count what of a head is parsed: it may come in one piece, with its body."""
        self._parsed_bytes += size_bytes
        if self._parsed_bytes > self._limits.max_header_bytes:
            self._stop(self._head_too_large())

    def _head_too_large(self) -> ApiError:
        limits = self._limits
        return ApiError(
            431,
            f"The request's head is larger than {limits.max_header_bytes} bytes "
            f"(server.max_header_bytes) or has more than {limits.max_headers} headers "
            "(server.max_headers).",
            code="headers_too_large",
        )

    def _stop(self, error: ApiError) -> None:
        """Refuse the request that is being parsed."""
        self._refusal = error
        # The parser takes this for the client's mistake, and has send_400_response called.
        raise ValueError(error.code)

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, and close; in the middle of another answer only close."""
        self._no_deadline()
        _log.info("%s: refused, %d %s", self._network or "this machine", error.status, error.code)
        if not self._is_answering:
            body = orjson.dumps(error.body)
            headers = [
                *self.server_state.default_headers,
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            if error.retry_after_seconds is not None:
                headers.append((b"retry-after", str(error.retry_after_seconds).encode()))
            lines = [
                STATUS_LINE[error.status],
                *(b"%b: %b\r\n" % each for each in headers),
                b"\r\n",
            ]
            self.transport.write(b"".join(lines) + body)
        self.transport.close()
        self._check_writes()

    def _await_more(self) -> None:
        """Begin the time within which a head must be complete, unless it has begun."""
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._deadline = self.loop.call_later(
                self._limits.header_timeout_seconds, self._head_is_late
            )

    def _head_is_late(self) -> None:
        self._deadline = None
        if not self._head_bytes:
            # Nothing was asked, or the rest of a body is late that nobody waits for.
            self.transport.close()
            self._check_writes()
            return
        seconds = self._limits.header_timeout_seconds
        self._refuse(
            ApiError(
                408,
                f"The request's head was not complete within {seconds:g} seconds "
                "(server.header_timeout_seconds).",
                code="request_timeout",
            )
        )

    def _no_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _check_writes(self) -> None:
        """Break the connection off when its client takes nothing of what waits for it any more."""
        if self._write_check is None and (waiting := self.transport.get_write_buffer_size()):
            self._write_check = self.loop.call_later(
                self._limits.write_timeout_seconds, self._written, waiting
            )

    def _written(self, waited_bytes: int) -> None:
        self._write_check = None
        if self.transport.get_write_buffer_size() >= waited_bytes:
            self.transport.abort()
        else:
            self._check_writes()

    def _no_write_check(self) -> None:
        if self._write_check is not None:
            self._write_check.cancel()
            self._write_check = None


def _too_many(status: int, whose: str, setting: str) -> ApiError:
    return ApiError(
        status,
        f"The {whose} has too many connections ({setting}).",
        code="too_many_connections",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )


def _network_of(address: str) -> str:
    """Whom an address belongs to, as far as it shows; empty for this machine, where proxies are."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    mapped = getattr(parsed, "ipv4_mapped", None)
    if parsed.is_loopback or (mapped is not None and mapped.is_loopback):
        return ""
    if parsed.version == 6 and mapped is None:
        return str(ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False))
    return str(mapped or parsed)
