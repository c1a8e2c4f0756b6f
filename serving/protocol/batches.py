"""OpenAI's Files and Batch APIs as they are on the wire: requests, objects, and lines of batches' files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from serving.protocol.embeddings import EmbeddingRequest
from serving.protocol.errors import ApiError, conflict, unsupported
from serving.protocol.openai_responses import ResponseRequest
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
    kind.path: kind
    for kind in (ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ResponseRequest)
}
ENDED = ("completed", "failed", "cancelled", "expired")
# Why lines were left, by how their batch ended: OpenAI's codes.
UNFINISHED = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was executed."),
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
}

# What OpenAI takes files for, and why they are of no use here.
_USELESS = {
    "assistants": "there is no Assistants API here; send texts with the request",
    "evals": "there are no evals here",
    "fine-tune": "nothing is trained here; adapters that are trained elsewhere are in the config",
    "user_data": "models do not read files here; send their text with the request",
    "vision": "models see images that come with the request, as data URLs",
}

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
    endpoint: str = Field(description=f"One of {', '.join(ENDPOINTS)}.")
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

    purpose: str = Field(description="Only 'batch'.")
    expires_after: ExpiresAfter | None = None

    @model_validator(mode="after")
    def _for_batches(self) -> Self:
        if self.purpose in _USELESS:
            raise unsupported("purpose", _USELESS[self.purpose])
        if self.purpose != "batch":
            raise conflict("purpose", "'purpose': only files for batches ('batch') can be uploaded")
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
        "usage": None,
        "metadata": request.metadata,
    }


def total_usage(usages: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a batch used: the sum of what its answers tell, each in the words of its API."""
    total = dict.fromkeys(("input", "cached", "output", "reasoning"), 0)
    for usage in usages:
        for kind, other in (("input", "prompt"), ("output", "completion")):
            total[kind] += usage.get(f"{kind}_tokens") or usage.get(f"{other}_tokens") or 0
            details = usage.get(f"{kind}_tokens_details") or usage.get(f"{other}_tokens_details")
            part = "cached" if kind == "input" else "reasoning"
            total[part] += (details or {}).get(f"{part}_tokens") or 0
    return {
        "input_tokens": total["input"],
        "input_tokens_details": {"cached_tokens": total["cached"]},
        "output_tokens": total["output"],
        "output_tokens_details": {"reasoning_tokens": total["reasoning"]},
        "total_tokens": total["input"] + total["output"],
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
    line_id: str,
    custom_id: str,
    request_id: str,
    status: int,
    body: object,
    headers: Mapping[str, str],
) -> dict[str, Any]:
    """What the engine answered to a line; ``headers`` are those of rigserve's own."""
    response = {"status_code": status, "request_id": request_id, "body": body, "headers": headers}
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
