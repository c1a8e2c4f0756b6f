"""The admin API for reloading the config."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import APIRouter, Depends
from starlette.responses import Response

from serving.gateway.intake import json_response
from serving.gateway.origin import refuse_other_sites


class Reloads(Protocol):
    """Whoever can take up a changed config."""

    async def reload(self) -> object:
        """Take the config file up as it is now."""

    def to_json(self) -> dict[str, Any]:
        """How the last time went."""


def routes(reloads: Reloads) -> APIRouter:
    """What `rigserve config status` shows, and the same as SIGHUP does."""
    router = APIRouter(
        prefix="/admin/reload", tags=["config"], dependencies=[Depends(refuse_other_sites)]
    )

    @router.get("")
    async def status() -> Response:
        """Whether the config file as it was last read is in use, and what it changed."""
        return json_response(reloads.to_json())

    @router.post("")
    async def reload() -> Response:
        """Take the config file up as it is now: 200 if it is in use then, 409 if nothing has changed."""
        await reloads.reload()
        told = reloads.to_json()
        return json_response(told, 200 if told["ok"] else 409)

    return router
