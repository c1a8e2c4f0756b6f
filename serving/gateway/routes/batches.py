"""OpenAI's Batch API."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serving.gateway.batch_store import Owner
from serving.gateway.identity import Identity, tenant_of
from serving.gateway.intake import Gateway, body_schema, json_response
from serving.protocol.batches import BatchRequest, PageQuery, begun, page
from serving.protocol.errors import ApiError
from serving.protocol.requests import validated
from serving.protocol.responses import new_id

_CANCELLABLE = ("validating", "in_progress")


def routes(gateway: Gateway) -> APIRouter:
    """Creating batches, and what can be done with them. ``BatchRunner`` runs them."""
    router = APIRouter()
    store = gateway.batches

    @router.post("/v1/batches", openapi_extra=body_schema(BatchRequest))
    async def create(http: Request) -> Response:
        """Run the requests in a file when there is nothing better to do."""
        asked = validated(BatchRequest, await gateway.fields_of(http))
        file = await gateway.files.get(asked.input_file_id, tenant_of(http))
        if file is None or file["purpose"] != "batch":
            raise ApiError(
                400,
                f"There is no file '{asked.input_file_id}' with the purpose 'batch'.",
                param="input_file_id",
                code="invalid_value",
            )
        batch = begun(new_id("batch").replace("-", "_"), asked, int(time.time()))
        kept = asked.output_expires_after
        identity: Identity = http.state.identity
        owner = Owner(identity.tenant, identity.key_id)
        await store.add(batch, kept.seconds if kept else None, owner)
        return json_response(await _batch(http, batch["id"]))

    @router.get("/v1/batches")
    async def listed(http: Request) -> Response:
        """The batches there are, the newest first."""
        query = validated(PageQuery, dict(http.query_params))
        batches = await store.page(query.after, query.limit + 1, tenant_of(http))
        return json_response(page(batches, query.limit))

    @router.get("/v1/batches/{batch_id}")
    async def retrieve(http: Request, batch_id: str) -> Response:
        """A batch and how far it is."""
        return json_response(await _batch(http, batch_id))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(http: Request, batch_id: str) -> Response:
        """End a batch; what is done of it goes to its files."""
        await _batch(http, batch_id)
        await store.move(batch_id, _CANCELLABLE, "cancelling")
        batch = await _batch(http, batch_id)
        if batch["cancelling_at"] is None:
            raise ApiError(
                409,
                f"The batch '{batch_id}' cannot be cancelled: it is {batch['status']}.",
                param="batch_id",
                code="batch_ended",
            )
        return json_response(batch)

    async def _batch(http: Request, batch_id: str) -> dict[str, Any]:
        batch = await store.get(batch_id, tenant_of(http))
        if batch is None:
            raise ApiError(
                404, f"No batch found with id '{batch_id}'.", param="batch_id", code="not_found"
            )
        return batch

    return router
