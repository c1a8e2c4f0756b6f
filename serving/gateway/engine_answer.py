"""What an engine's whole answer says, and what is told instead where it says nothing."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson
from starlette.responses import Response

from serving.engines.remote import Remote
from serving.gateway.routing import Backend
from serving.gateway.translation import Translation
from serving.protocol.errors import ApiError
from serving.protocol.responses import Timings, Usage

_RETRY_AFTER_SECONDS = 2
_LARGEST_BYTES = 64 * 2**20

NOTHING_USED = {
    "usage": Usage(0, 0, 0).to_json(),
    "timings": Timings(0.0, 0.0, 0.0, 0.0, 0.0).to_json(),
}


async def body_of(answer: aiohttp.ClientResponse) -> bytes:
    """A server's whole answer; raises :class:`aiohttp.ClientPayloadError` if it is too large to be one."""
    body = bytearray()
    async for data in answer.content.iter_any():
        body += data
        if len(body) > _LARGEST_BYTES:
            answer.close()
            raise aiohttp.ClientPayloadError(f"it answers more than {_LARGEST_BYTES} bytes")
    return bytes(body)


def final_of(
    engine: Backend, answer: aiohttp.ClientResponse, payload: bytes
) -> dict[str, Any] | None:
    """What holds the request's usage and timings; None if the engine failed over it.

    An engine that refuses a request (too long, queue full) has done nothing for it.
    Raises :class:`ApiError` (502) for what is no answer at all.
    """
    if answer.status != 200:
        object_of(engine, payload)
        is_free = isinstance(engine, Remote) or answer.status != 500
        return NOTHING_USED if is_free else None
    # Vectors are long, and no text can look like this: its quotes would be escaped.
    tail = payload.rfind(b',"usage":{')
    return object_of(engine, b"{" + payload[tail + 1 :] if tail >= 0 else payload)


def object_of(engine: Backend, payload: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError as error:
        raise bad_answer(engine.model.served_name) from error
    if not isinstance(body, dict):
        raise bad_answer(engine.model.served_name)
    return body


def relayed(
    engine: Backend,
    answer: aiohttp.ClientResponse,
    payload: bytes,
    translation: Translation | None = None,
) -> Response:
    if translation is not None:
        try:
            payload = orjson.dumps(_told(answer, object_of(engine, payload), translation))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise bad_answer(engine.model.served_name) from error
    retry_after = answer.headers.get("retry-after")
    headers = {"retry-after": retry_after} if retry_after else {}
    return Response(payload, answer.status, headers, media_type="application/json")


def _told(
    answer: aiohttp.ClientResponse, body: dict[str, Any], translation: Translation
) -> dict[str, Any]:
    """An answer in another API's words. Where it makes no sense, whatever error comes of that is raised."""
    content = body["choices" if answer.ok else "error"]
    if not content:
        raise LookupError("there is nothing in it")
    if answer.ok:
        return translation.answer(body)
    # Some servers' errors are the message alone.
    error = {"message": content} if isinstance(content, str) else content
    return translation.refusal(answer.status, {"error": error})


def bad_answer(model: str) -> ApiError:
    return ApiError(
        502,
        f"The engine of '{model}' gave an answer that makes no sense.",
        code="bad_engine_answer",
    )


def engine_gone(engine: Backend) -> ApiError:
    if isinstance(engine, Remote):
        return ApiError(
            503,
            f"The server of the model '{engine.model.served_name}' broke off.",
            code="remote_broke_off",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        )
    return ApiError(
        503,
        f"The engine of '{engine.model.served_name}' stopped while it worked on this request; "
        "it is being started again.",
        code="engine_stopped",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )
