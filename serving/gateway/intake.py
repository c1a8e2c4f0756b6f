"""What the gateway's routes work with, and how a request comes in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.gateway.routing import Router, endpoint_of
from serving.metrics import UNKNOWN_MODEL, Metrics
from serving.protocol.errors import ApiError
from serving.protocol.requests import ModelRequest, read_object
from serving.protocol.sse import CLIENT_CLOSED_REQUEST
from serving.protocol.structured import Body

Asked = TypeVar("Asked", bound=ModelRequest)


@dataclass(slots=True)
class Gateway:
    """What the routes work with. ``draining`` turns new requests away while old ones finish."""

    router: Router
    relay: Relay
    meter: Meter
    metrics: Metrics
    session: aiohttp.ClientSession
    max_body_bytes: int
    draining: bool = False
    started_unix: int = field(default_factory=lambda: int(time.time()))

    async def take(
        self, http: Request, read: Callable[[dict[str, Any]], Asked]
    ) -> tuple[Engine, Endpoint, Asked]:
        """Where an HTTP request goes, and what ``read`` makes of its body's fields.

        Requests that are turned away are counted. Raises :class:`ApiError`.
        """
        try:
            fields = read_object(await self.body_of(http))
        except ApiError as error:
            self.meter.unmetered(UNKNOWN_MODEL, http.url.path, error.status)
            raise
        except ClientDisconnect:
            self.meter.unmetered(UNKNOWN_MODEL, http.url.path, CLIENT_CLOSED_REQUEST)
            raise
        return self.admit(http.url.path, fields, read)

    def admit(
        self, path: str, fields: dict[str, Any], read: Callable[[dict[str, Any]], Asked]
    ) -> tuple[Engine, Endpoint, Asked]:
        """As :meth:`take`, for a body that is there already."""
        model = UNKNOWN_MODEL
        try:
            asked = read(fields)
            engine = self.router.find(asked.model)
            model = engine.model.name
            if self.draining:
                raise ApiError(
                    503, "The server is shutting down.", code="draining", retry_after_seconds=5
                )
            endpoint = endpoint_of(engine)
        except ApiError as error:
            self.meter.unmetered(model, path, error.status)
            raise
        return engine, endpoint, asked

    async def body_of(self, http: Request) -> bytes:
        """The request's body; raises :class:`ApiError` (413) as soon as it proves too large."""
        limit_bytes = self.max_body_bytes
        declared = http.headers.get("content-length", "")
        body = bytearray()
        if not (declared.isdigit() and int(declared) > limit_bytes):
            async for chunk in http.stream():
                body += chunk
                if len(body) > limit_bytes:
                    break
            else:
                return bytes(body)
        raise ApiError(
            413,
            f"The request body is larger than {limit_bytes} bytes (server.max_body_bytes).",
            code="request_too_large",
        )


def json_response(payload: object, status: int = 200) -> Response:
    """A response of JSON."""
    return Response(orjson.dumps(payload), status, media_type="application/json")


def body_schema(kind: type[Body]) -> dict[str, Any]:
    """OpenAPI's description of a body that the route parses by itself."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    for part in schema.pop("$defs", {}).values():
        part.pop("title", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
