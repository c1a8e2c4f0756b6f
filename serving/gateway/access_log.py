"""One line for each request: who asked what of which model, how it went, how long it took, what it cost.

What reached an engine is told once it is metered, so that its tokens are known, also those of a client that
has left. All else is told when it is answered.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.cost.ledger import UsageRecord
from serving.gateway.tracing import Trace
from serving.protocol.sse import CLIENT_CLOSED_REQUEST

_log = logging.getLogger("rigserve.access")

# What asks for these asks again every few seconds.
_PROBES = frozenset(("/health", "/ready", "/metrics"))
_SHOWN_CHARACTERS = 200


@dataclass(slots=True)
class Entry:
    """How a request is told of; ``is_metered`` once it is on its way to an engine.

    Of one that is not: the ``model`` or route that it asks for, and the ``error`` (its code) that it ended with.
    """

    is_metered: bool = False
    model: str | None = None
    error: str | None = None
    trace: Trace | None = None


class AccessLogMiddleware:
    """Tells of requests that are not metered, and ends their traces."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = scope["state"]["log_entry"] = Entry()
        started, status = time.monotonic(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            if not entry.is_metered:
                _tell_of_unmetered(scope, entry, status, time.monotonic() - started)
                if entry.trace is not None:
                    entry.trace.answered(status)


def tell_of_metered(
    record: UsageRecord, key_name: str, ttft_seconds: float | None, total_seconds: float
) -> None:
    """Tell of a request that has ended at an engine."""
    if not _log.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "status": record.status,
        "method": "POST",
        "endpoint": record.endpoint,
        "model": record.model,
        "key": key_name,
        "tenant": record.tenant,
        "streamed": record.streamed,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "tokens_source": record.tokens_source,
        "queue_seconds": round(record.queue_seconds, 6),
        "ttft_seconds": None if ttft_seconds is None else round(ttft_seconds, 6),
        "total_seconds": round(total_seconds, 6),
        "usd": record.usd,
        "client_gone": record.status == CLIENT_CLOSED_REQUEST,
    }
    first = "" if ttft_seconds is None else f"first token {ttft_seconds:.3f} s, "
    _log.info(
        "%s; %s, %d+%d tokens, %s%.3f s, %.9f USD",
        *(_head(fields), record.model, record.prompt_tokens, record.completion_tokens),
        *(first, total_seconds, record.usd),
        extra={"fields": fields},
    )


def _tell_of_unmetered(scope: Scope, entry: Entry, status: int, total_seconds: float) -> None:
    level = logging.DEBUG if scope["path"] in _PROBES and status < 400 else logging.INFO
    if not _log.isEnabledFor(level):
        return
    identity = scope["state"]["identity"]
    fields = {
        "request_id": scope["state"]["request_id"],
        "status": status,
        "method": scope["method"],
        # As it was sent, without the query: decoded, it could hold a line of its own.
        "endpoint": scope["raw_path"].decode("ascii", "replace")[:_SHOWN_CHARACTERS],
        "model": entry.model,
        "error": entry.error,
        "key": identity.key_name,
        "tenant": identity.tenant,
        "total_seconds": round(total_seconds, 6),
        "client_gone": status == CLIENT_CLOSED_REQUEST,
    }
    why = "".join(f"{word}, " for word in (entry.model, entry.error) if word)
    _log.log(level, "%s; %s%.3f s", _head(fields), why, total_seconds, extra={"fields": fields})


def _head(fields: dict[str, Any]) -> str:
    head = "{request_id} {status} {method} {endpoint}".format_map(fields)
    return head if fields["key"] == "-" else f"{head}, key {fields['key']} of {fields['tenant']}"
