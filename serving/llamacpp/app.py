"""What the HTTP faces of generating and of embedding models have in common."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.llamacpp.tokenization import Tokenization
from serving.protocol.embeddings import DetokenizeRequest, TokenizeRequest
from serving.protocol.errors import ApiError, respond_with_error
from serving.protocol.sse import ClientDisconnected, respond_to_nobody

# What models may be asked for, and what it is called when a model cannot do it.
_TASKS = {
    "/v1/chat/completions": "chat completions",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "reranking",
}


def application(
    routes: Sequence[Route],
    *,
    model: str,
    kind: str,
    tokenization: Tokenization,
    api_key: str | None,
) -> Starlette:
    """The ASGI application with these routes and the tokenizer's; the other tasks are refused.

    ``kind`` says what the model is; with an ``api_key`` every path asks for it.
    """
    served = {route.path for route in routes}
    refusals = [
        _refusal(path, f"The model '{model}' is {kind}: it does not support {task}.")
        for path, task in _TASKS.items()
        if path not in served
    ]
    return Starlette(
        routes=[*routes, *_tokenizer_routes(tokenization), *refusals],
        middleware=[Middleware(_RequireKey, api_key=api_key)] if api_key else [],
        exception_handlers={
            ApiError: respond_with_error,
            ClientDisconnected: respond_to_nobody,
            ClientDisconnect: respond_to_nobody,
            Exception: _respond_with_bug,
        },
    )


def json_response(payload: object) -> Response:
    """A 200; NumPy arrays are written as lists."""
    body = orjson.dumps(payload, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, media_type="application/json")


def _tokenizer_routes(tokenization: Tokenization) -> list[Route]:
    async def tokenize(http: Request) -> Response:
        request = TokenizeRequest.parse(await http.body())
        return json_response(await asyncio.to_thread(tokenization.tokenize, request))

    async def detokenize(http: Request) -> Response:
        request = DetokenizeRequest.parse(await http.body())
        return json_response(await asyncio.to_thread(tokenization.detokenize, request))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _refusal(path: str, message: str) -> Route:
    async def refuse(_http: Request) -> Response:
        raise ApiError(400, message, param="model", code="unsupported_model")

    return Route(path, refuse, methods=["POST"])


def _respond_with_bug(_request: Request, _error: Exception) -> Response:
    # Starlette logs the traceback, and the connection is closed: nobody should try to use it again.
    response = ApiError(500, "Something failed inside the engine; its log has more.").response
    response.headers["connection"] = "close"
    return response


class _RequireKey:
    """Turns away requests without the launch's key: other local users are not the gateway."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "This engine takes requests from its gateway only.")
                app = error.response
        await app(scope, receive, send)
