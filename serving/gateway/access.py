"""Who may ask for what: API keys at the door, and limits told on the way out."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Literal

import orjson
from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.gateway.identity import ANYBODY, NOBODY, Identity
from serving.gateway.limits import Limits, WindowState
from serving.gateway.origin import is_of_other_site
from serving.keys.ring import KeyRing
from serving.metrics import Metrics
from serving.protocol.anthropic import error_json
from serving.protocol.errors import ApiError

MetricsAccess = Literal["loopback", "open", "key"]
Headers = Iterable[tuple[bytes, bytes]]

_OPEN_PATHS = frozenset(("/health", "/ready", "/docs", "/openapi.json"))
_OPEN_FOLDERS = ("/docs/",)
_ADMIN_FOLDER = "/admin/"
_METRICS_PATH = "/metrics"
_ANTHROPIC_PATH = "/v1/messages"
# What changes nothing. Its answer is not shown to pages that are not let in.
_READING = frozenset(("GET", "HEAD", "OPTIONS"))


class Access:
    """The rules of the door.

    Where there are keys, or ``require_keys`` says so, all but health, readiness and documentation needs one.
    Otherwise everybody is the rig's owner, who administers it from the rig itself.
    """

    def __init__(
        self,
        ring: KeyRing,
        limits: Limits,
        metrics: Metrics,
        *,
        require_keys: bool,
        metrics_access: MetricsAccess,
        sites: Collection[str] = (),
    ) -> None:
        """``sites`` are the origins of other sites whose pages may use the server."""
        self.ring = ring
        self.limits = limits
        self._metrics = metrics
        self._require_keys = require_keys
        self._metrics_access = metrics_access
        self._sites = frozenset(sites)

    @property
    def needs_keys(self) -> bool:
        """Whether requests need a key now."""
        return self._require_keys or self.ring.in_use

    def identify(self, scope: Scope) -> Identity:
        """Who sends a request. Raises :class:`ApiError` (401, 403) for what they may not ask for."""
        path: str = scope["path"]
        if scope["method"] not in _READING and is_of_other_site(scope["headers"], self._sites):
            # A page can send forms, and bodies without a type, without its browser's asking first.
            raise self._refusal(
                403,
                "Pages of other sites may not use this server unless server.cors_origins lists them.",
                "cross_site",
            )
        if not self.needs_keys:
            if path.startswith(_ADMIN_FOLDER) and not is_loopback(_client_of(scope)):
                raise self._refusal(
                    403,
                    "Without API keys a rig is administered from itself only; make an admin key "
                    "with `rigserve keys create NAME --admin`.",
                    "admin_required",
                )
            return ANYBODY
        secret = _secret_of(scope["headers"])
        key = self.ring.find(secret) if secret else None
        if key is None:
            if self._is_open(path, scope):
                return NOBODY
            raise self._refusal(
                401,
                "Incorrect API key provided; it may have been revoked, or be expired."
                if secret
                else "No API key provided; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
                "invalid_api_key",
            )
        if path.startswith(_ADMIN_FOLDER) and not key.is_admin:
            raise self._refusal(403, "This takes an admin key.", "admin_required")
        return Identity.of(key)

    def check_model(self, identity: Identity, name: str, own_name: str | None) -> None:
        """Raise :class:`ApiError` (403) if a key may not use a model.

        ``own_name`` is that of the model that ``name`` reaches, None if it reaches none: a key with a list
        does not learn what else there is.
        """
        if not may_use(identity, name, own_name):
            allowed = ", ".join(identity.models or ())
            raise self._refusal(
                403,
                f"This API key may not use the model '{name[:128]}'; it may use: {allowed}.",
                "model_not_allowed",
                param="model",
            )

    def rate_headers(self, identity: Identity, path: str) -> Headers:
        """What a response says of its key's limits per minute, as its API's clients expect it."""
        requests, tokens = self.limits.states(identity)
        told = _anthropic_headers if path.startswith(_ANTHROPIC_PATH) else _openai_headers
        if requests is not None:
            yield from told("requests", requests)
        if tokens is not None:
            yield from told("tokens", tokens)

    def _is_open(self, path: str, scope: Scope) -> bool:
        if path == _METRICS_PATH:
            return self._metrics_access == "open" or (
                self._metrics_access == "loopback" and is_loopback(_client_of(scope))
            )
        return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDERS)

    def _refusal(
        self, status: int, message: str, reason: str, *, param: str | None = None
    ) -> ApiError:
        self._metrics.refusals.labels(reason).inc()
        return ApiError(status, message, code=reason, param=param)


class AccessMiddleware:
    """Puts the sender's identity into each request's state, or answers that it may not be."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        access, path = self._access, scope["path"]
        try:
            identity = access.identify(scope)
        except ApiError as error:
            scope["state"]["log_entry"].error = error.code
            response = in_shape(error, path, State(scope["state"]).request_id)
            await response(scope, receive, send)
            return
        scope["state"]["identity"] = identity
        if identity.key_id is None:
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = access.rate_headers(identity, path)
                message["headers"] = [*message["headers"], *told]
            await send(message)

        await self._app(scope, receive, send_with_limits)


def may_use(identity: Identity, name: str, own_name: str | None) -> bool:
    """Whether a key may use the model that ``name`` reaches, whose own name is ``own_name``."""
    return identity.models is None or name in identity.models or own_name in identity.models


def is_loopback(host: str) -> bool:
    """Whether an address, as text, is this machine's own."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def _client_of(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _secret_of(headers: Headers) -> str:
    """The key that a request was sent with; empty if with none."""
    found = ""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, secret = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and secret.strip():
                return secret.strip()
        elif name == b"x-api-key":
            found = value.decode("latin-1").strip()
    return found


def in_shape(error: ApiError, path: str, request_id: str) -> Response:
    """The response that an error is, in the shape of the API that was asked."""
    response = error.response
    if path.startswith(_ANTHROPIC_PATH):
        body = orjson.dumps(error_json(error.status, error.body["error"], request_id))
        response.body = body
        response.headers["content-length"] = str(len(body))
        response.headers["request-id"] = request_id
    return response


def _openai_headers(what: str, state: WindowState) -> Headers:
    values = (state.limit, state.remaining, f"{state.reset_seconds:.3f}s")
    for name, value in zip(("limit", "remaining", "reset"), values, strict=True):
        yield f"x-ratelimit-{name}-{what}".encode(), str(value).encode()


def _anthropic_headers(what: str, state: WindowState) -> Headers:
    reset_at = datetime.now(UTC) + timedelta(seconds=state.reset_seconds)
    values = (state.limit, state.remaining, reset_at.strftime("%Y-%m-%dT%H:%M:%SZ"))
    for name, value in zip(("limit", "remaining", "reset"), values, strict=True):
        yield f"anthropic-ratelimit-{what}-{name}".encode(), str(value).encode()
