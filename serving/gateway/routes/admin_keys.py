"""The admin API for API keys. It takes an admin key."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.intake import Gateway, body_schema, json_response
from serving.keys.key import Key
from serving.protocol.errors import ApiError
from serving.protocol.keys import NewKey, RotateKey
from serving.protocol.requests import validated

_Result = TypeVar("_Result")


def routes(gateway: Gateway) -> APIRouter:
    """Making, showing and ending keys. A key may be named by its id or its name."""
    router = APIRouter(prefix="/admin/keys", tags=["keys"])
    store = gateway.keys

    async def done(http: Request, work: Callable[[], _Result]) -> _Result:
        """Do it; returns once it holds in this process, too."""
        _require_admin_key(http)

        def work_and_refresh() -> _Result:
            result = work()
            with contextlib.suppress(sqlite3.Error):  # it looks again by itself
                gateway.access.ring.refresh()
            return result

        return await asyncio.to_thread(work_and_refresh)

    @router.post("", openapi_extra=body_schema(NewKey))
    async def create(http: Request) -> Response:
        """Make a key. Its secret is told here and nowhere else."""
        _require_admin_key(http)
        asked = validated(NewKey, await gateway.fields_of(http))
        key, secret = await done(http, lambda: store.create(asked))
        return json_response({**_told(key), "secret": secret}, 201)

    @router.get("")
    async def listed(http: Request) -> Response:
        """All keys, those revoked included, the oldest first."""
        keys = await done(http, store.all)
        return json_response({"object": "list", "data": list(map(_told, keys))})

    @router.get("/{key}")
    async def retrieve(http: Request, key: str) -> Response:
        """One key."""
        return json_response(_told(await done(http, lambda: store.get(key))))

    @router.delete("/{key}")
    @router.post("/{key}/revoke")
    async def revoke(http: Request, key: str) -> Response:
        """End a key for good; what its requests have begun may finish."""
        return json_response(_told(await done(http, lambda: store.revoke(key))))

    @router.post("/{key}/rotate", openapi_extra=body_schema(RotateKey))
    async def rotate(http: Request, key: str) -> Response:
        """Give a key a new secret, which is told here and nowhere else."""
        _require_admin_key(http)
        asked = validated(RotateKey, await gateway.fields_of(http))
        rotated, secret = await done(http, lambda: store.rotate(key, asked.grace_seconds))
        return json_response({**_told(rotated), "secret": secret})

    return router


def _require_admin_key(http: Request) -> None:
    """Raise :class:`ApiError` (403) without one, also where no keys are in use.

    Then every page in the owner's browser could make the first, and lock the owner out.
    """
    if http.state.identity.key_id is None:
        raise ApiError(
            403,
            "Keys are administered with an admin key; make the first with "
            "`rigserve keys create NAME --admin`.",
            code="admin_required",
        )


def _told(key: Key) -> dict[str, Any]:
    return key.to_json(time.time())
