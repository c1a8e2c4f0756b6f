"""The gateway's HTTP face."""

from __future__ import annotations

import asyncio
import difflib
import re
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import __version__
from serving.config import served_name_of
from serving.engines.breaker import BreakerState
from serving.engines.supervisor import Engine
from serving.gateway.access import AccessMiddleware, in_shape, may_use
from serving.gateway.access_log import AccessLogMiddleware
from serving.gateway.api_document import describe
from serving.gateway.body_room import BodyRoomMiddleware
from serving.gateway.filters import IGNORED_HEADER, ignored_header
from serving.gateway.identity import ANYBODY, NOBODY, Identity
from serving.gateway.intake import Gateway, json_response
from serving.gateway.routes import admin_keys, batches, docs, files, inference, messages, responses
from serving.gateway.routing import Backend, Route, adapters_of, own_name_of
from serving.gateway.tracing import Tracing, TracingMiddleware
from serving.gateway.wires import wire_of
from serving.protocol.errors import ApiError, dotted, respond_with_error
from serving.protocol.responses import model_json, new_id
from serving.protocol.sse import ClientDisconnected, respond_to_nobody

REQUEST_ID_HEADER = "x-request-id"
_ACCEPTED_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_SHOWN_CHARACTERS = 200
# What is answered there is for who asked, and for no cache on the way.
_PRIVATE_FOLDERS = ("/v1/", "/admin/")


def create_app(gateway: Gateway, tracing: Tracing | None = None) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(
        title="rigserve",
        version=__version__,
        summary="OpenAI-compatible, metered, local",
        # FastAPI's own pages are made of other sites' scripts.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(AccessMiddleware, access=gateway.access)
    if tracing is not None:
        app.add_middleware(TracingMiddleware, tracing=tracing)
    app.add_middleware(AccessLogMiddleware)
    app.add_middleware(_RequestHeaders)
    app.add_middleware(BodyRoomMiddleware)
    app.add_exception_handler(ApiError, _respond_with_error)
    app.add_exception_handler(HTTPException, _respond_with_http_error)
    app.add_exception_handler(RequestValidationError, _respond_with_bad_query)
    app.add_exception_handler(ClientDisconnected, respond_to_nobody)
    app.add_exception_handler(ClientDisconnect, respond_to_nobody)
    app.add_exception_handler(Exception, _respond_with_bug)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The gateway is alive."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready(http: Request) -> Response:
        """200 once every model that is to be loaded takes requests, otherwise 503; the body tells the states of models.

        Of replicas, one is enough. States are told of models that the request's key may use; where keys are in
        use, none without.
        """
        identity: Identity = http.state.identity
        states = {engine.model.name: engine.state.value for engine in gateway.router.engines}
        for remote in gateway.router.remotes:
            is_closed = remote.breaker.state is BreakerState.CLOSED
            states[remote.model.name] = "ready" if is_closed else "unavailable"
        shown = {
            name: state
            for name, state in states.items()
            if identity is not NOBODY and may_use(identity, name, served_name_of(name))
        }
        takes: dict[str, bool] = {}
        for engine in gateway.router.engines:
            if engine.is_expected:
                name = engine.model.served_name
                takes[name] = takes.get(name, False) or engine.endpoint is not None
        is_ready = not gateway.draining and all(takes.values())
        return json_response({"ready": is_ready, "models": shown}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        await _ask_engines(gateway)
        _look_at_remotes(gateway)
        gateway.relay.admission.publish()
        return Response(gateway.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(http: Request) -> Response:
        """All models, aliases, LoRA adapters and routes that the request's key may use."""
        identity: Identity = http.state.identity
        entries = [
            _model_entry(gateway, name, found)
            for name in gateway.router.names
            if may_use(identity, name, own_name_of(found := gateway.router.find(name), name))
        ]
        return json_response({"object": "list", "data": entries})

    @app.get("/v1/models/{name:path}")
    async def model(http: Request, name: str) -> Response:
        """One model."""
        found = gateway.find(http.state.identity, name)
        return json_response(_model_entry(gateway, name, found))

    # Looked through in turn for each request: what is asked for most comes first.
    routers = (
        inference.routes(gateway),
        messages.routes(gateway),
        responses.routes(gateway),
        files.routes(gateway),
        batches.routes(gateway),
        admin_keys.routes(gateway),
        docs.routes(),
    )
    for router in routers:
        app.include_router(router)
    app.state.api_routes = [
        route
        for each in (app, *routers)
        for route in each.routes
        if isinstance(route, APIRoute) and route.include_in_schema
    ]
    describe(app, gateway)
    return app


def _model_entry(gateway: Gateway, name: str, found: Backend | Route) -> dict[str, Any]:
    parent = None
    if not isinstance(found, Route) and name in adapters_of(found):
        parent = found.model.name
    return model_json(name, gateway.started_unix, parent)


def _look_at_remotes(gateway: Gateway) -> None:
    """Bring the gauges of remotes up to date."""
    metrics, spending = gateway.metrics, gateway.relay.spending
    metrics.breaker_state.clear()
    metrics.api_budget.clear()
    metrics.api_spent.clear()
    for remote in gateway.router.remotes:
        model = remote.model
        for state in BreakerState:
            is_in_it = remote.breaker.state is state
            metrics.breaker_state.labels(model.name, state.value).set(is_in_it)
        if model.budget_usd is not None:
            labels = (model.name, model.budget_period)
            metrics.api_budget.labels(*labels).set(model.budget_usd)
            spent_usd = spending.spent_usd(model.name, model.budget_period)
            metrics.api_spent.labels(*labels).set(spent_usd)


async def _ask_engines(gateway: Gateway) -> None:
    """Ask all engines for what they count about themselves."""
    engines, metrics = gateway.router.engines, gateway.metrics
    loads = await asyncio.gather(*(_load_of(engine, gateway.session) for engine in engines))
    metrics.engines.answers = {
        engine.model.name: load for engine, load in zip(engines, loads, strict=True)
    }
    metrics.engine_ready.clear()
    metrics.engine_restarts.clear()
    metrics.engine_state.clear()
    metrics.engine_memory.clear()
    for engine in engines:
        name = engine.model.name
        metrics.engine_ready.labels(name).set(1 if engine.endpoint else 0)
        metrics.engine_restarts.labels(name).set(engine.restarts)
        metrics.engine_state.labels(name, engine.state.value).set(1)
        for device, share_mib in engine.shares_mib.items():
            metrics.engine_memory.labels(name, device).set(share_mib * 2**20)


async def _load_of(engine: Engine, session: aiohttp.ClientSession) -> dict[str, Any]:
    """The engine's own counts; empty when it does not answer within a second."""
    endpoint = engine.endpoint
    if endpoint is None:
        return {}
    headers = {"authorization": f"Bearer {endpoint.api_key}"}
    timeout = aiohttp.ClientTimeout(total=1)
    wire = wire_of(engine.model)
    try:
        async with session.get(
            f"{endpoint.base_url}{wire.load_path}", headers=headers, timeout=timeout
        ) as answer:
            return wire.read_load(await answer.read()) if answer.ok else {}
    except (aiohttp.ClientError, TimeoutError):
        return {}


async def _respond_with_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.log_entry.error = error.code
    return await respond_with_error(request, error)


def _respond_with_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.scope['path'][:_SHOWN_CHARACTERS]}"
    if error.status_code == 404:
        near = _near_paths(request)
        hint = f"did you mean {' or '.join(near)}?" if near else "/docs lists what there is."
        return ApiError(404, f"There is nothing at {asked}; {hint}", code="unknown_url").response
    if error.status_code == 405:
        allowed = ", ".join(_methods_at(request))
        refusal = ApiError(
            405, f"{asked} is not allowed; allowed: {allowed}.", code="method_not_allowed"
        ).response
        refusal.headers["allow"] = allowed
        return refusal
    return ApiError(error.status_code, f"{error.detail}.", code="invalid_request").response


def _near_paths(request: Request) -> list[str]:
    """Paths that the request may have meant: many forget or repeat the ``/v1`` of their base URL."""
    paths = [
        route.path
        for route in request.app.state.api_routes
        if request.method in route.methods and "{" not in route.path
    ]
    asked = request.url.path[:_SHOWN_CHARACTERS].rstrip("/").lower()
    tail = [path for path in paths if path == f"/v1{asked}" or asked.endswith(path)]
    return tail or difflib.get_close_matches(asked, paths, n=1, cutoff=0.8)


def _methods_at(request: Request) -> list[str]:
    """The methods that some route takes at the request's path."""
    return [
        method
        for method in _METHODS
        if any(
            route.matches({**request.scope, "method": method})[0] is Match.FULL
            for route in request.app.routes
        )
    ]


def _respond_with_bad_query(_request: Request, error: Exception) -> Response:
    """What FastAPI calls 422 is a 400 at OpenAI."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The location begins with where the parameter stands: in the path, the query, or a header.
    param = dotted(tuple(first["loc"][1:]))
    return ApiError(400, f"'{param}': {first['msg']}.", param=param, code="invalid_value").response


def _respond_with_bug(request: Request, _error: Exception) -> Response:
    # Starlette logs the traceback; the client learns only where to look for it.
    request_id = request.scope["state"]["request_id"]
    bug = ApiError(500, f"Something failed inside rigserve; its log has more under {request_id}.")
    response = in_shape(bug, request.url.path, request_id)
    # Starlette sends this past the middleware.
    response.headers[REQUEST_ID_HEADER] = request_id
    return response


class _RequestHeaders:
    """Gives every request an id (the client's own, if it sent a sane one), and returns it.

    Beside it, the response tells what of the request did not count.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"").decode("latin-1")
        request_id = given if _ACCEPTED_REQUEST_ID.fullmatch(given) else new_id("req")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["identity"] = ANYBODY
        added = [(REQUEST_ID_HEADER.encode(), request_id.encode())]
        if scope["path"].startswith(_PRIVATE_FOLDERS):
            added.append((b"cache-control", b"no-store"))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
                if ignored := state.get("ignored"):
                    names = ignored_header(map(state.get("own_name", str), ignored))
                    message["headers"].append((IGNORED_HEADER.encode(), names.encode()))
            await send(message)

        await self._app(scope, receive, send_with_headers)
