"""The admin API for LoRA adapters that come and go while the server runs."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.intake import Gateway, body_schema, json_response
from serving.gateway.origin import refuse_other_sites
from serving.protocol.adapters import NewAdapter
from serving.protocol.requests import validated


class Adapters(Protocol):
    """Whoever adds and removes them."""

    async def add(self, asked: NewAdapter) -> dict[str, Any]:
        """Serve one from now on; raises :class:`ApiError`."""

    async def remove(self, name: str) -> dict[str, Any]:
        """Serve one no more; raises :class:`ApiError`."""

    def listed(self) -> list[dict[str, Any]]:
        """All of them."""


def routes(gateway: Gateway, adapters: Adapters) -> APIRouter:
    """What `rigserve adapters` shows and does."""
    router = APIRouter(
        prefix="/admin/adapters", tags=["adapters"], dependencies=[Depends(refuse_other_sites)]
    )

    @router.get("")
    async def listed() -> Response:
        """All adapters: the config's and those that were added, those that leave or are not served included."""
        return json_response({"object": "list", "data": adapters.listed()})

    @router.post("", openapi_extra=body_schema(NewAdapter))
    async def add(http: Request) -> Response:
        """Serve an adapter, until it is removed; returns when it takes requests. Streams in flight are left alone."""
        asked = validated(NewAdapter, await gateway.fields_of(http))
        return json_response(await adapters.add(asked), 201)

    # Names may hold slashes.
    @router.delete("/{adapter:path}")
    async def remove(adapter: str) -> Response:
        """Take no more requests for an added adapter. With requests in flight it is `leaving`, and goes with the last."""
        return json_response(await adapters.remove(adapter))

    return router
