"""What the gateway's routes work with, and how a request comes in."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serving.config import ServerConfig
from serving.gateway.access import Access, may_use
from serving.gateway.access_log import Entry
from serving.gateway.background import BackgroundResponses
from serving.gateway.balancing import marks_of
from serving.gateway.batch_store import BatchStore
from serving.gateway.body_room import BodyRoom
from serving.gateway.caller import SPILL_OVER_HEADER
from serving.gateway.dispatch import Destination, Dispatcher, Plan
from serving.gateway.file_store import FileStore
from serving.gateway.filters import Filters, filters_of
from serving.gateway.identity import Identity
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.gateway.routing import Backend, Candidate, Role, Route, Router, label_of, own_name_of
from serving.keys.store import KeyStore
from serving.metrics import UNKNOWN_MODEL, Metrics
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import ChatCompletionRequest, ModelRequest, read_object
from serving.protocol.sse import CLIENT_CLOSED_REQUEST
from serving.protocol.structured import Body

Asked = TypeVar("Asked", bound=ModelRequest)

# Larger bodies are parsed beside the event loop.
_LARGE_BODY_BYTES = 256 * 1024


@dataclass(slots=True)
class Gateway:
    """What the routes work with. ``draining`` turns new requests away while old ones finish."""

    access: Access
    keys: KeyStore
    router: Router
    relay: Relay
    dispatcher: Dispatcher
    meter: Meter
    metrics: Metrics
    session: aiohttp.ClientSession
    max_body_bytes: int
    body_timeout_seconds: float
    body_room: BodyRoom
    responses: BackgroundResponses
    files: FileStore
    batches: BatchStore
    lenient: bool = False
    draining: bool = False
    started_unix: int = field(default_factory=lambda: int(time.time()))
    _filters: dict[str, Filters] = field(init=False)
    _filters_of_unknown: Filters = field(init=False)

    def __post_init__(self) -> None:
        """Raises :class:`ConfigError` for filters that cannot be applied."""
        models = [backend.model for backend in self.router.backends]
        self._filters = filters_of(models, lenient=self.lenient)
        self._filters_of_unknown = Filters(None, lenient=self.lenient)

    def configure(self, router: Router, server: ServerConfig) -> None:
        """Use other models and settings from the next request on.

        Raises :class:`ConfigError` for filters that cannot be applied; then nothing has changed.
        """
        models = [backend.model for backend in router.backends]
        filters = filters_of(models, lenient=server.lenient)
        self.router = router
        self._filters = filters
        self._filters_of_unknown = Filters(None, lenient=server.lenient)
        self.lenient = server.lenient
        self.max_body_bytes = server.max_body_bytes
        self.body_timeout_seconds = server.body_timeout_seconds
        self.body_room.wait_seconds = server.body_timeout_seconds

    async def take(
        self, http: Request, read: Callable[[dict[str, Any]], Asked]
    ) -> tuple[Destination, Asked]:
        """Where an HTTP request goes, and what ``read`` makes of its body's fields.

        The model's filters are applied; what of the request thereby does not count is left in
        ``http.state.ignored``. Requests that are turned away are counted. Raises :class:`ApiError`.
        """
        return self.take_fields(http, await self.fields_of(http), read)

    def take_fields(
        self, http: Request, fields: dict[str, Any], read: Callable[[dict[str, Any]], Asked]
    ) -> tuple[Destination, Asked]:
        """As :meth:`take`, for the fields that :meth:`fields_of` gave."""
        may_spill = SPILL_OVER_HEADER not in http.headers
        admitted = self.admit(
            *(http.url.path, http.state.identity, fields, read),
            may_spill=may_spill,
            log_entry=http.state.log_entry,
        )
        destination, asked, http.state.ignored = admitted
        return destination, asked

    async def fields_of(self, http: Request) -> dict[str, Any]:
        """The fields of an HTTP request's body; raises :class:`ApiError`, and counts what it turns away."""
        try:
            _check_media_type(http)
            _check_spill_over(http)
            async with self.body_room.incoming(int(min(_declared(http), self.max_body_bytes))):
                body = await self.body_of(http)
                await self.body_room.keep(body, http.state.body_share)
                if len(body) > _LARGE_BODY_BYTES:
                    return await asyncio.to_thread(read_object, body)
                return read_object(body)
        except ApiError as error:
            self.meter.unmetered(UNKNOWN_MODEL, http.url.path, error.status)
            raise
        except ClientDisconnect:
            self.meter.unmetered(UNKNOWN_MODEL, http.url.path, CLIENT_CLOSED_REQUEST)
            raise

    def admit(
        self,
        path: str,
        identity: Identity,
        fields: dict[str, Any],
        read: Callable[[dict[str, Any]], Asked],
        *,
        may_spill: bool = False,
        log_entry: Entry | None = None,
    ) -> tuple[Destination, Asked, list[str]]:
        """As :meth:`take`, for a body that is there already; also gives what of it does not count, once it is answered.

        ``may_spill``: it may go to a model that costs money, if the route that it asks for has one. The model is
        noted in the ``log_entry``.
        """
        model = UNKNOWN_MODEL
        try:
            asked, dropped = self._filters_for(fields.get("model")).read(fields, read)
            found = self.find(identity, asked.model)
            model = label_of(found)
            if log_entry is not None:
                log_entry.model = model
            destination: Destination
            if isinstance(found, Route):
                destination, asked, ignored = self._plan(found, identity, asked, dropped, may_spill)
            else:
                destination = found
                asked, overruled = self._filters[model].apply(asked)
                ignored = [*dropped, *overruled]
            if self.draining:
                raise ApiError(
                    503, "The server is shutting down.", code="draining", retry_after_seconds=5
                )
        except ApiError as error:
            self.meter.unmetered(model, path, error.status)
            raise
        return destination, asked, ignored

    def _plan(
        self,
        route: Route,
        identity: Identity,
        asked: Asked,
        dropped: Sequence[str],
        may_spill: bool,
    ) -> tuple[Plan, Asked, list[str]]:
        """Whom to ask for a route's request, the request as the first of them gets it, and what does not count.

        That list changes when another of them is asked.
        """
        marks = marks_of(route.name, asked)
        is_batch = identity.priority == "batch" or (
            isinstance(asked, ChatCompletionRequest) and asked.priority == "batch"
        )
        candidates = [
            each
            for each in self.dispatcher.balancer.order(
                route, marks, may_spill=may_spill and not is_batch
            )
            # A key with a list of models spends money only on those it names.
            if each.role is not Role.SPILL_OVER or may_use(identity, each.name, None)
        ]

        # A reload while the first are tried may take the others away.
        filters = self._filters

        def prepare(candidate: Candidate) -> tuple[Asked, list[str]]:
            named = asked.model_copy(update={"model": candidate.name})
            return filters[candidate.backend.model.name].apply(named)

        while True:
            try:
                first, overruled = prepare(candidates[0])
                break
            except ApiError as error:
                # Others may know the field.
                if error.code != UNSUPPORTED_PARAMETER or len(candidates) == 1:
                    raise
                del candidates[0]
        ignored = [*dropped, *overruled]

        def prepare_another(candidate: Candidate) -> Asked:
            another, overruled = prepare(candidate)
            ignored[:] = [*dropped, *overruled]
            return another

        return Plan(route, candidates, marks, prepare_another), first, ignored

    def find(self, identity: Identity, name: str) -> Backend | Route:
        """What serves a model's name; raises :class:`ApiError`: 403 if it is not for who asks, 404 if there is none."""
        try:
            found = self.router.find(name)
        except ApiError:
            self.access.check_model(identity, name, None)
            raise
        self.access.check_model(identity, name, own_name_of(found, name))
        return found

    def _filters_for(self, name: object) -> Filters:
        """What is known to apply before a request has been read: the filters of the model it names.

        A route reads as its first model does.
        """
        try:
            found = self.router.find(name) if isinstance(name, str) else None
        except ApiError:
            found = None
        if isinstance(found, Route):
            found = found.candidates[0].backend
        return self._filters[found.model.name] if found else self._filters_of_unknown

    async def body_of(self, http: Request) -> bytes:
        """The request's body; raises :class:`ApiError`: 413 as soon as it proves too large, 408 if it does not come."""
        try:
            async with asyncio.timeout(self.body_timeout_seconds):
                body = await _up_to(self.max_body_bytes, http)
        except TimeoutError:
            raise ApiError(
                408,
                f"The request body was not complete within {self.body_timeout_seconds:g} seconds "
                "(server.body_timeout_seconds).",
                code="request_timeout",
            ) from None
        if body is None:
            raise ApiError(
                413,
                f"The request body is larger than {self.max_body_bytes} bytes "
                "(server.max_body_bytes).",
                code="request_too_large",
            )
        return body


async def _up_to(limit_bytes: int, http: Request) -> bytes | None:
    """The request's body, or None if it is larger."""
    declared = _declared(http)
    if limit_bytes < declared < math.inf:
        return None
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > limit_bytes:
            return None
    return bytes(body)


def _declared(http: Request) -> float:
    """How long a body says it is, in bytes; one that does not say may be of any length."""
    declared = http.headers.get("content-length", "")
    return int(declared) if declared.isdigit() else math.inf


def _check_media_type(http: Request) -> None:
    """Raise :class:`ApiError` (415) for a body that says it is something else than plain JSON in UTF-8.

    One that does not say is taken: scripts leave the header out.
    """
    header = http.headers.get("content-type", "")
    media_type, _, options = header.lower().partition(";")
    charset = options.partition("charset=")[2].strip(' "')
    encoding = http.headers.get("content-encoding", "identity").lower()
    if media_type.strip() not in ("", "application/json"):
        found, wanted = f"of type {media_type.strip()[:100]!r}", "application/json"
    elif charset not in ("", "utf-8", "utf8", "us-ascii"):
        found, wanted = f"in the charset {charset[:100]!r}", "utf-8"
    elif encoding != "identity":
        found, wanted = f"in the encoding {encoding[:100]!r}", "no content-encoding"
    else:
        return
    raise ApiError(
        415, f"The request body is {found}; send it with {wanted}.", code="unsupported_media_type"
    )


def _check_spill_over(http: Request) -> None:
    """Raise :class:`ApiError` (400) for a word that is not known: a prompt that has left does not come back."""
    word = http.headers.get(SPILL_OVER_HEADER, "never")
    if word != "never":
        raise ApiError(
            400,
            f"The header {SPILL_OVER_HEADER} can be 'never' only; got {word[:100]!r}.",
            param=SPILL_OVER_HEADER,
            code="invalid_value",
        )


def json_response(payload: object, status: int = 200) -> Response:
    """A response of JSON."""
    return Response(orjson.dumps(payload), status, media_type="application/json")


def body_schema(kind: type[Body]) -> dict[str, Any]:
    """OpenAPI's description of a body that the route parses by itself."""
    schema = kind.model_json_schema()
    whole = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": whole}}}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A JSON schema with its ``parts`` in place of references to them: a route cannot define any."""
    if isinstance(schema, list):
        return [_inlined(each, parts) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inlined(each, parts) for name, each in schema.items() if name != "discriminator"}
