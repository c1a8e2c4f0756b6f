"""OpenAI's Files API, as far as batches need it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, BinaryIO

from fastapi import APIRouter
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from serving.gateway.file_store import copying, storage_error
from serving.gateway.identity import tenant_of
from serving.gateway.intake import Gateway, json_response
from serving.protocol.batches import (
    BATCH_FILE_KEPT_SECONDS,
    MAX_FILE_BYTES,
    FilesQuery,
    UploadFields,
    page,
)
from serving.protocol.errors import ApiError
from serving.protocol.requests import validated
from serving.protocol.responses import new_id

# The other fields and what stands between the parts.
_FORM_OVERHEAD_BYTES = 64 * 1024
_MAX_FIELDS = 8
_PIECE_BYTES = 256 * 1024
_MAX_FILENAME = 255
_NESTED = re.compile(r"expires_after\[(\w{1,32})\]")


def routes(gateway: Gateway) -> APIRouter:
    """Uploading files, and what can be done with them."""
    router = APIRouter()
    store = gateway.files

    @router.post("/v1/files")
    async def upload(http: Request) -> Response:
        """Keep a file for a batch."""
        form = await _form_of(gateway, http)
        try:
            file, fields = _parts_of(form)
            asked = validated(UploadFields, fields)
            name = os.path.basename(file.filename or "")[:_MAX_FILENAME]
            kept = asked.expires_after.seconds if asked.expires_after else BATCH_FILE_KEPT_SECONDS
            if (file.size or 0) > MAX_FILE_BYTES:
                raise _too_large()
            added = await store.add(
                new_id("file"),
                copying(file.file),
                filename=name.encode(errors="replace").decode(),
                purpose=asked.purpose,
                keep_seconds=kept,
                tenant=tenant_of(http),
            )
            return json_response(added)
        finally:
            await form.close()

    @router.get("/v1/files")
    async def listed(http: Request) -> Response:
        """The files there are."""
        query = validated(FilesQuery, dict(http.query_params))
        files = await store.page(
            after=query.after,
            limit=query.limit + 1,
            order=query.order,
            purpose=query.purpose,
            tenant=tenant_of(http),
        )
        return json_response(page(files, query.limit))

    @router.get("/v1/files/{file_id}")
    async def retrieve(http: Request, file_id: str) -> Response:
        """What is known of a file."""
        file = await store.get(file_id, tenant_of(http))
        if file is None:
            raise _not_found(file_id)
        return json_response(file)

    @router.get("/v1/files/{file_id}/content")
    async def content(http: Request, file_id: str) -> Response:
        """A file's content."""
        file = await store.open(file_id, tenant_of(http))
        if file is None:
            raise _not_found(file_id)
        return StreamingResponse(_pieces(file), media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}")
    async def delete(http: Request, file_id: str) -> Response:
        """Delete a file. Batches that have begun do not need it any more."""
        if not await store.delete(file_id, tenant_of(http)):
            raise _not_found(file_id)
        return json_response({"id": file_id, "object": "file", "deleted": True})

    return router


async def _form_of(gateway: Gateway, http: Request) -> FormData:
    """The form of a request, its file on the disk; raises :class:`ApiError`."""
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise ApiError(
            415, "Files are uploaded as multipart/form-data.", code="unsupported_media_type"
        )
    parser = MultiPartParser(http.headers, _limited(http), max_files=1, max_fields=_MAX_FIELDS)
    try:
        async with asyncio.timeout(gateway.body_timeout_seconds):
            return await parser.parse()
    except TimeoutError:
        raise ApiError(
            408,
            f"The file was not complete within {gateway.body_timeout_seconds:g} seconds "
            "(server.body_timeout_seconds).",
            code="request_timeout",
        ) from None
    except MultiPartException as error:
        raise ApiError(
            400, f"The form is not valid: {error.message}", code="invalid_form"
        ) from error
    except OSError as error:
        raise storage_error(error) from error


async def _limited(http: Request) -> AsyncGenerator[bytes, None]:
    limit_bytes = MAX_FILE_BYTES + _FORM_OVERHEAD_BYTES
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large()
    size_bytes = 0
    async for chunk in http.stream():
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise _too_large()
        yield chunk


def _parts_of(form: FormData) -> tuple[UploadFile, dict[str, Any]]:
    """The file of a form, and its other fields; raises :class:`ApiError`."""
    fields: dict[str, Any] = {}
    file: UploadFile | None = None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name == "file":
            file = value
            continue
        if isinstance(value, UploadFile):
            raise _bad_field(name, "only 'file' is a file")
        nested = _NESTED.fullmatch(name)
        target = fields.setdefault("expires_after", {}) if nested else fields
        key = nested[1] if nested else name
        if not isinstance(target, dict) or key in target:
            raise _bad_field(name, "given twice")
        if nested and key == "seconds" and value.isascii() and value.isdigit() and len(value) < 10:
            target[key] = int(value)
        else:
            target[key] = value
    if file is None:
        raise ApiError(400, "'file' is required.", param="file", code="missing_required_parameter")
    return file, fields


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece


def _bad_field(name: str, reason: str) -> ApiError:
    shown = name[:64].encode(errors="replace").decode()
    return ApiError(400, f"'{shown}': {reason}.", param=shown, code="invalid_value")


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"Files may be {MAX_FILE_BYTES} bytes large.",
        param="file",
        code="request_too_large",
    )


def _not_found(file_id: str) -> ApiError:
    return ApiError(404, f"No such file: '{file_id}'.", param="file_id", code="not_found")
