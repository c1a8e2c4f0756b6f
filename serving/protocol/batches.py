"""OpenAI's Files and Batch APIs as they are on the wire: requests, objects, and lines of batches' files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from serving.protocol.embeddings import EmbeddingRequest
from serving.protocol.errors import ApiError, unsupported
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
    read_object,
)
from serving.protocol.structured import Body

# OpenAI's own limits.
MAX_FILE_BYTES = 200 * 1024 * 1024
MAX_LINES = 50_000
WINDOW_SECONDS = 24 * 3600
BATCH_FILE_KEPT_SECONDS = 30 * 24 * 3600
# A file may be wrong in every line; its author wants to see some of that.
MAX_ERRORS = 100

_MAX_CUSTOM_ID = 512

ENDPOINTS: dict[str, type[ModelRequest]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
ENDED = ("completed", "failed", "cancelled", "expired")

_Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]


class ExpiresAfter(Body):
    """How long after its creation a file is deleted."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class BatchRequest(Body):
    """What a batch is made of."""

    input_file_id: str = Field(max_length=128)
    endpoint: str
    completion_window: Literal["24h"]
    metadata: _Metadata | None = None
    output_expires_after: ExpiresAfter | None = None

    @field_validator("endpoint")
    @classmethod
    def _served_in_batches(cls, value: str) -> str:
        if value not in ENDPOINTS:
            raise ValueError(f"batches can be for {', '.join(ENDPOINTS)} only")
        return value


class UploadFields(Body):
    """What is said of a file that is uploaded."""

    model_config = ConfigDict(strict=False)

    purpose: str
    expires_after: ExpiresAfter | None = None

    @model_validator(mode="after")
    def _for_batches(self) -> Self:
        if self.purpose != "batch":
            raise unsupported("purpose", "only files for batches ('batch') can be uploaded")
        return self


class PageQuery(Body):
    """Which batches, the newest first, are wanted."""

    model_config = ConfigDict(strict=False)

    after: str | None = Field(None, max_length=128)
    limit: int = Field(20, ge=1, le=100)


class FilesQuery(Body):
    """Which files are wanted."""

    model_config = ConfigDict(strict=False)

    after: str | None = Field(None, max_length=128)
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = Field(None, max_length=64)


def page(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list of the first ``limit`` rows; the row beyond tells that there are more."""
    shown = rows[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(rows) > limit,
    }


def begun(batch_id: str, request: BatchRequest, now_unix: int) -> dict[str, Any]:
    """A new batch, as OpenAI's object without its ``request_counts``."""
    return {
        "id": batch_id,
        "object": "batch",
        "endpoint": request.endpoint,
        "model": None,
        "errors": None,
        "input_file_id": request.input_file_id,
        "completion_window": request.completion_window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now_unix,
        "in_progress_at": None,
        "expires_at": now_unix + WINDOW_SECONDS,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "metadata": request.metadata,
    }


@dataclass(frozen=True, slots=True)
class Line:
    """A request of a batch: the ``number`` of its line in the file, from 1 on."""

    number: int
    custom_id: str
    body: bytes


def read_lines(
    lines: Iterable[bytes], endpoint: str
) -> tuple[list[Line], str | None, list[dict[str, Any]]]:
    """The requests of a batch's input file, the one model they name, and what is wrong with the file.

    The fields of the requests themselves are checked when they are run.
    """
    read: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    model: str | None = None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line, named = _read_line(number, text, endpoint)
            if line.custom_id in seen:
                raise _wrong("custom_id", "duplicate_custom_id", "an earlier line has the same")
            seen.add(line.custom_id)
            if named != (model := model or named):
                raise _wrong("body.model", "mismatched_model", "all lines must name one model")
            read.append(line)
            if len(read) > MAX_LINES:
                raise _wrong(None, "too_many_requests", f"at most {MAX_LINES} lines are allowed")
        except ApiError as error:
            errors.append(
                {
                    "code": error.code,
                    "line": number,
                    "message": error.message,
                    "param": error.param,
                }
            )
            if len(errors) == MAX_ERRORS or error.code == "too_many_requests":
                break
    if not read and not errors:
        errors.append(
            {"code": "empty_file", "line": None, "message": "The file is empty.", "param": None}
        )
    return read, model, errors


def output_line(
    line_id: str, custom_id: str, request_id: str, status: int, body: object
) -> dict[str, Any]:
    """What the engine answered to a line."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": line_id, "custom_id": custom_id, "response": response, "error": None}


def unanswered_line(line_id: str, custom_id: str, code: str, message: str) -> dict[str, Any]:
    """What is told of a line that was never answered."""
    error = {"code": code, "message": message}
    return {"id": line_id, "custom_id": custom_id, "response": None, "error": error}


def _read_line(number: int, text: bytes, endpoint: str) -> tuple[Line, str]:
    fields = read_object(text)
    unknown = fields.keys() - {"custom_id", "method", "url", "body"}
    if unknown:
        name = min(unknown)[:64]
        raise _wrong(name, "unknown_parameter", "a line has no such field")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID:
        raise _wrong(
            "custom_id",
            "invalid_custom_id",
            f"a text of 1 to {_MAX_CUSTOM_ID} characters is needed",
        )
    if fields.get("method") != "POST":
        raise _wrong("method", "invalid_method", "must be 'POST'")
    if fields.get("url") != endpoint:
        raise _wrong("url", "invalid_url", f"must be the batch's endpoint, '{endpoint}'")
    body = fields.get("body")
    if not isinstance(body, dict):
        raise _wrong("body", "invalid_body", "must be an object")
    model = body.get("model")
    if not isinstance(model, str):
        raise _wrong("body.model", "missing_model", "must name a model")
    if body.get("stream") not in (None, False):
        raise _wrong("body.stream", "unsupported_parameter", "batches are not streamed")
    try:
        written = orjson.dumps(body)
    except TypeError as error:
        # Integers beyond 64 bits: nothing that is asked for takes them.
        raise _wrong("body", "invalid_body", f"cannot be represented: {error}") from error
    return Line(number, custom_id, written), model


def _wrong(param: str | None, code: str, reason: str) -> ApiError:
    subject = f"'{param}': " if param else ""
    return ApiError(400, f"{subject}{reason}.", param=param, code=code)
