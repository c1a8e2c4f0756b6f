"""Anthropic's Messages API, errors included. Its headers (``x-api-key``, ``anthropic-*``) change nothing."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.caller import Caller
from serving.gateway.engine_answer import bad_answer
from serving.gateway.intake import Gateway, body_schema, json_response
from serving.protocol.anthropic import (
    CountTokensRequest,
    MessagesRequest,
    MessageTranslation,
    error_json,
)
from serving.protocol.errors import ApiError
from serving.protocol.requests import validated

_OTHER_METHODS = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "PUT"]


def routes(gateway: Gateway) -> APIRouter:
    """Messages, and what they would count."""
    router = APIRouter(route_class=_Route)

    @router.post("/v1/messages", openapi_extra=body_schema(MessagesRequest))
    async def messages(http: Request) -> Response:
        """Answer a conversation (Anthropic's API)."""
        destination, asked = await gateway.take(
            http, lambda fields: validated(MessagesRequest, fields).chat
        )
        translation = MessageTranslation(asked, http.state.request_id)
        return await gateway.dispatcher.forward(Caller.of(http), destination, asked, translation)

    @router.post("/v1/messages/count_tokens", openapi_extra=body_schema(CountTokensRequest))
    async def count_tokens(http: Request) -> Response:
        """Count the tokens of a conversation (Anthropic's API)."""
        destination, asked = await gateway.take(
            http, lambda fields: validated(CountTokensRequest, fields).tokenization
        )
        answer = await gateway.dispatcher.ask(Caller.of(http), destination, asked)
        told = orjson.loads(bytes(answer.body))
        if answer.status_code == 200 and isinstance(told.get("count"), int):
            return json_response({"input_tokens": told["count"]})
        if answer.status_code == 200 or not isinstance(told.get("error"), dict):
            raise bad_answer(asked.model)
        return _error(http, answer.status_code, told["error"], answer.headers)

    @router.api_route("/v1/messages", methods=_OTHER_METHODS, include_in_schema=False)
    @router.api_route("/v1/messages/count_tokens", methods=_OTHER_METHODS, include_in_schema=False)
    async def not_allowed(http: Request) -> Response:
        error = {"message": f"{http.method} is not allowed here; send a POST."}
        return _error(http, 405, error, {"allow": "POST"})

    @router.api_route(
        "/v1/messages/{path:path}", methods=["POST", *_OTHER_METHODS], include_in_schema=False
    )
    async def not_found(http: Request) -> Response:
        error = {"message": "There is nothing here; batches of requests are run by /v1/batches."}
        return _error(http, 404, error)

    return router


class _Route(APIRoute):
    """Answers errors in Anthropic's shape, and tells the request's id by Anthropic's name."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_in_shape(http: Request) -> Response:
            try:
                response = await handle(http)
            except ApiError as error:
                http.state.log_entry.error = error.code
                response = _error(http, error.status, error.body["error"], error.response.headers)
            response.headers["request-id"] = http.state.request_id
            return response

        return handle_in_shape


def _error(
    http: Request, status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> Response:
    """The response that an error is, with those of ``headers`` that tell what to do about it."""
    response = json_response(error_json(status, error, http.state.request_id), status)
    for name in ("allow", "retry-after", "x-should-retry"):
        if headers and name in headers:
            response.headers[name] = headers[name]
    return response
