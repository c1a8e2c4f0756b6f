"""From the fields of a Responses request to what an engine is asked, and where its answer is kept.

Requests over HTTP and lines of batches come this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from serving.gateway.dispatch import Destination, Plan
from serving.gateway.response_store import ResponseStore, StoredResponse
from serving.gateway.routing import own_name_of
from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import (
    Item,
    ResponseRequest,
    ResponseTranslation,
    begun,
    numbered,
    reference_of,
)
from serving.protocol.requests import MAX_MESSAGES, ChatCompletionRequest

Read = Callable[[dict[str, Any]], ChatCompletionRequest]

_ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[Item])
_CONTINUABLE = ("completed", "incomplete")


@dataclass(frozen=True, slots=True)
class Exchange:
    """A response that is asked for: the chat completion that it is made of, and the way back."""

    request: ResponseRequest
    destination: Destination
    chat: ChatCompletionRequest
    translation: ResponseTranslation
    input: list[dict[str, Any]]
    store: ResponseStore
    tenant: str

    async def keep(self) -> None:
        """Store the response as it is now, if it is to be stored. Raises :class:`ApiError`."""
        if self.request.is_stored:
            stored = StoredResponse(self.translation.response, self.input)
            await self.store.add(stored, self.tenant)


async def begin(
    store: ResponseStore,
    tenant: str,
    fields: dict[str, Any],
    admit: Callable[[Read], tuple[Destination, ChatCompletionRequest]],
) -> Exchange:
    """Begin a response that will be ``tenant``'s; ``admit`` finds its engine. Raises :class:`ApiError`."""
    reading = _Reading(
        await _history(store, tenant, fields.get("previous_response_id")),
        await _referenced(store, tenant, fields.get("input")),
    )
    destination, chat = admit(reading.read)
    request = reading.request
    name = (
        destination.route.name
        if isinstance(destination, Plan)
        else own_name_of(destination, chat.model)
    )
    taken = {item["id"] for item in reading.history}
    translation = ResponseTranslation(
        begun(request, chat, name),
        seal_reasoning=request.wants_sealed_reasoning,
    )
    return Exchange(
        request=request,
        destination=destination,
        chat=chat,
        translation=translation,
        input=numbered(request.items, taken),
        store=store,
        tenant=tenant,
    )


def items_of(chain: list[StoredResponse]) -> list[dict[str, Any]]:
    """All items of a chain of responses, the oldest first."""
    return [item for stored in chain for item in (*stored.input, *stored.body["output"])]


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


async def _history(
    store: ResponseStore, tenant: str, previous_id: object
) -> list[dict[str, Any]] | ApiError:
    """The items of the response to continue and of those before it, or why it cannot be continued."""
    if not isinstance(previous_id, str):
        return []
    try:
        chain = await store.chain(previous_id, tenant)
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
    return items_of(chain)


async def _referenced(
    store: ResponseStore, tenant: str, items: object
) -> dict[str, dict[str, Any]] | ApiError:
    """The stored items that a request's input refers to, as far as there are such, or why not."""
    names = map(reference_of, items[:MAX_MESSAGES]) if isinstance(items, list) else ()
    wanted = [name for name in names if name is not None]
    try:
        return await store.output_items(wanted, tenant) if wanted else {}
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
