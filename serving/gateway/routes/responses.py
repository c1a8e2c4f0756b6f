"""OpenAI's Responses API: made of chat completions, and of what is stored."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.engines.supervisor import Engine
from serving.gateway.intake import Gateway, body_schema, json_response
from serving.gateway.relay import Caller
from serving.gateway.response_store import ResponseStore, StoredResponse
from serving.gateway.routing import adapters_of
from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import (
    InputItemsQuery,
    Item,
    ResponseRequest,
    ResponseTranslation,
    RetrieveQuery,
    begun,
    numbered,
    own_name,
    reference_of,
)
from serving.protocol.requests import MAX_MESSAGES, ChatCompletionRequest, validated
from serving.protocol.structured import Body

_Query = TypeVar("_Query", bound=Body)

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_CONTINUABLE = ("completed", "incomplete")


def routes(gateway: Gateway) -> APIRouter:
    """Creating responses, and what can be done with stored ones."""
    router = APIRouter()
    store = gateway.responses.store

    @router.post("/v1/responses", openapi_extra=body_schema(ResponseRequest))
    async def create(http: Request) -> Response:
        """Answer a conversation, and keep the answer."""
        fields = await gateway.fields_of(http)
        reading = _Reading(
            await _history(store, fields.get("previous_response_id")),
            await _referenced(store, fields.get("input")),
        )
        engine, asked = gateway.take_fields(http, fields, reading.read)
        http.state.ignored = list(map(own_name, http.state.ignored))
        request = reading.request
        response = begun(request, asked, _resolved(engine, asked.model))
        taken = {item["id"] for item in reading.history}
        items = numbered(request.items, taken)
        translation = ResponseTranslation(response)

        async def keep() -> None:
            if request.is_stored:
                await store.add(StoredResponse(translation.response, items))

        if request.background:
            await keep()
            gateway.responses.begin(Caller.of(http), engine, asked, translation)
            return json_response(response)
        answer = await gateway.relay.forward(Caller.of(http), engine, asked, translation)
        if answer.status_code != 200:
            return answer
        if request.stream:
            return _KeptStream(answer, translation, keep)
        await keep()
        return answer

    @router.get("/v1/responses/{response_id}")
    async def retrieve(http: Request, response_id: str) -> Response:
        """A stored response."""
        _query_of(http, RetrieveQuery)
        return json_response(await _stored(store, response_id))

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forget a stored response; one that is in progress ends."""
        if not await store.delete(response_id):
            raise _not_found(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        """End a response that is made in the background; nothing happens to one that has ended."""
        response = await _stored(store, response_id)
        if not response["background"]:
            raise ApiError(
                400,
                "Only responses made with 'background' set to true can be cancelled.",
                param="response_id",
                code="invalid_value",
            )
        await store.cancel(response_id)
        return json_response(await _stored(store, response_id))

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(http: Request, response_id: str) -> Response:
        """The items that a stored response answers, those of the responses it continues included."""
        query = _query_of(http, InputItemsQuery)
        chain = await store.chain(response_id)
        if not chain:
            raise _not_found(response_id)
        *earlier, last = chain
        return json_response(query.page([*_items_of(earlier), *last.input]))

    return router


class _Reading:
    """Reads a request that continues a history, and may refer to items that are stored."""

    def __init__(
        self,
        history: list[dict[str, Any]] | ApiError,
        referenced: dict[str, dict[str, Any]] | ApiError,
    ) -> None:
        self._history = history
        self._referenced = referenced
        self.request: ResponseRequest

    @property
    def history(self) -> list[dict[str, Any]]:
        """The items before the request's own; raises :class:`ApiError` if they cannot be had."""
        if isinstance(self._history, ApiError):
            raise self._history
        return self._history

    def read(self, fields: dict[str, Any]) -> ChatCompletionRequest:
        """The chat completion that the fields ask for; raises :class:`ApiError`."""
        self.request = ResponseRequest.of(self._dereferenced(fields))
        return self.request.chat(_ITEMS.validate_python(self.history))

    def _dereferenced(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields with the items that were referred to in their places."""
        if isinstance(self._referenced, ApiError):
            raise self._referenced
        items = fields.get("input")
        if not isinstance(items, list) or len(items) > MAX_MESSAGES:
            return fields
        found = [
            item if (name := reference_of(item)) is None else self._referenced.get(name)
            for item in items
        ]
        if None in found:
            raise _not_stored(found.index(None), items)
        return {**fields, "input": found}


class _KeptStream(Response):
    """A stream that tells how the response ended once that is stored."""

    def __init__(
        self,
        stream: Response,
        translation: ResponseTranslation,
        keep: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__()
        self._stream = stream
        self._translation = translation
        self._keep = keep

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.body" and not message["more_body"]:
                message = {**message, "body": await self._ending()}
            await send(message)

        await self._stream(scope, receive, send_on)

    async def _ending(self) -> bytes:
        try:
            await self._keep()
        except ApiError as error:
            self._translation.fail(error.body)
        return self._translation.terminal()


async def _history(store: ResponseStore, previous_id: object) -> list[dict[str, Any]] | ApiError:
    """The items of the response to continue and of those before it, or why it cannot be continued."""
    if not isinstance(previous_id, str):
        return []
    try:
        chain = await store.chain(previous_id)
    except ApiError as error:
        return error
    if not chain or chain[0].body["previous_response_id"] is not None:
        subject = f"The previous response '{previous_id}'"
        what = "one that it continues is gone" if chain else "it does not exist"
        return _previous_error(
            f"{subject} cannot be continued: {what}.", "previous_response_not_found"
        )
    status = chain[-1].body["status"]
    if status not in _CONTINUABLE:
        return _previous_error(
            f"The previous response '{previous_id}' cannot be continued: it is {status}.",
            "invalid_value",
        )
    return _items_of(chain)


async def _referenced(store: ResponseStore, items: object) -> dict[str, dict[str, Any]] | ApiError:
    """The stored items that a request's input refers to, as far as there are such, or why not."""
    names = map(reference_of, items[:MAX_MESSAGES]) if isinstance(items, list) else ()
    wanted = [name for name in names if name is not None]
    try:
        return await store.output_items(wanted) if wanted else {}
    except ApiError as error:
        return error


def _not_stored(position: int, items: list[Any]) -> ApiError:
    return ApiError(
        404,
        f"No stored response has an output item with the id '{reference_of(items[position])}'; "
        "send the item itself.",
        param=f"input[{position}]",
        code="not_found",
    )


def _previous_error(message: str, code: str) -> ApiError:
    return ApiError(400, message, param="previous_response_id", code=code)


def _items_of(chain: list[StoredResponse]) -> list[dict[str, Any]]:
    return [item for stored in chain for item in (*stored.input, *stored.body["output"])]


async def _stored(store: ResponseStore, response_id: str) -> dict[str, Any]:
    response = await store.get(response_id)
    if response is None:
        raise _not_found(response_id)
    return response


def _not_found(response_id: str) -> ApiError:
    return ApiError(
        404, f"Response with id '{response_id}' not found.", param="response_id", code="not_found"
    )


def _resolved(engine: Engine, name: str) -> str:
    """The name of the model that answers to ``name``, as the engine tells it."""
    return name if name in adapters_of(engine) else engine.model.name


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
