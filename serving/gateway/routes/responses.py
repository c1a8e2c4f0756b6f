"""OpenAI's Responses API: made of chat completions, and of what is stored."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.gateway.caller import Caller
from serving.gateway.identity import tenant_of
from serving.gateway.intake import Gateway, body_schema, json_response
from serving.gateway.responding import Exchange, begin, items_of
from serving.gateway.response_store import ResponseStore
from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import (
    InputItemsQuery,
    ResponseRequest,
    RetrieveQuery,
    own_name,
)
from serving.protocol.requests import validated
from serving.protocol.structured import Body

_Query = TypeVar("_Query", bound=Body)


def routes(gateway: Gateway) -> APIRouter:
    """Creating responses, and what can be done with stored ones."""
    router = APIRouter()
    store = gateway.responses.store

    @router.post("/v1/responses", openapi_extra=body_schema(ResponseRequest))
    async def create(http: Request) -> Response:
        """Answer a conversation, and keep the answer."""
        fields = await gateway.fields_of(http)
        exchange = await begin(
            store,
            tenant_of(http),
            fields,
            lambda read: gateway.take_fields(http, fields, read),
        )
        http.state.own_name = own_name
        asked = (Caller.of(http), exchange.destination, exchange.chat, exchange.translation)
        if exchange.request.background:
            await exchange.keep()
            gateway.responses.begin(*asked)
            return json_response(exchange.translation.response)
        answer = await gateway.dispatcher.forward(*asked)
        if answer.status_code != 200:
            return answer
        if exchange.request.stream:
            return _KeptStream(answer, exchange)
        await exchange.keep()
        return answer

    @router.get("/v1/responses/{response_id}")
    async def retrieve(http: Request, response_id: str) -> Response:
        """A stored response."""
        _query_of(http, RetrieveQuery)
        return json_response(await _stored(store, response_id, tenant_of(http)))

    @router.delete("/v1/responses/{response_id}")
    async def delete(http: Request, response_id: str) -> Response:
        """Forget a stored response; one that is in progress ends."""
        if not await store.delete(response_id, tenant_of(http)):
            raise _not_found(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(http: Request, response_id: str) -> Response:
        """End a response that is made in the background; nothing happens to one that has ended."""
        response = await _stored(store, response_id, tenant_of(http))
        if not response["background"]:
            raise ApiError(
                400,
                "Only responses made with 'background' set to true can be cancelled.",
                param="response_id",
                code="invalid_value",
            )
        await store.cancel(response_id, tenant_of(http))
        return json_response(await _stored(store, response_id, tenant_of(http)))

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(http: Request, response_id: str) -> Response:
        """The items that a stored response answers, those of the responses it continues included."""
        query = _query_of(http, InputItemsQuery)
        chain = await store.chain(response_id, tenant_of(http))
        if not chain:
            raise _not_found(response_id)
        *earlier, last = chain
        return json_response(query.page([*items_of(earlier), *last.input]))

    return router


class _KeptStream(Response):
    """A stream that tells how the response ended once that is stored."""

    def __init__(self, stream: Response, exchange: Exchange) -> None:
        super().__init__()
        self._stream = stream
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.body" and not message["more_body"]:
                message = {**message, "body": await self._ending()}
            await send(message)

        await self._stream(scope, receive, send_on)

    async def _ending(self) -> bytes:
        try:
            await self._exchange.keep()
        except ApiError as error:
            self._exchange.translation.fail(error.body)
        return self._exchange.translation.terminal()


async def _stored(store: ResponseStore, response_id: str, tenant: str) -> dict[str, Any]:
    response = await store.get(response_id, tenant)
    if response is None:
        raise _not_found(response_id)
    return response


def _not_found(response_id: str) -> ApiError:
    return ApiError(
        404, f"Response with id '{response_id}' not found.", param="response_id", code="not_found"
    )


def _query_of(http: Request, kind: type[_Query]) -> _Query:
    """A request's query string; lists come as ``name=a&name=b`` or ``name[]=a&name[]=b``."""
    fields: dict[str, Any] = {}
    for key, value in http.query_params.multi_items():
        name = key.removesuffix("[]")
        if name == "include":
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    return validated(kind, fields)
