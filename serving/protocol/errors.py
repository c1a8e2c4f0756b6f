"""Errors as OpenAI's clients expect them: a status, and a body their SDK turns into an exception class."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

UNKNOWN_PARAMETER = "unknown_parameter"
UNSUPPORTED_PARAMETER = "unsupported_parameter"

# OpenAI's names for these; other 4xx are invalid_request_error, 5xx api_error.
_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
# A field's name may be as long as a body.
_SHOWN_CHARACTERS = 200

Location = tuple[int | str, ...]


class ApiError(Exception):
    """A request that ends in an error response.

    Args:
        status: HTTP status.
        message: For the person who sent the request: what was wrong and what to do.
        code: Machine-readable reason, such as ``model_not_found``.
        param: The request field at fault, such as ``messages[0].role``.
        location: The same as its path in the body, where the body's validation found it.
        retry_after_seconds: Sent as ``Retry-After`` when the same request may succeed later.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        location: Location = (),
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.location = location
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        default = "invalid_request_error" if self.status < 500 else "api_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPE_BY_STATUS.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> Response:
        """The complete HTTP response."""
        headers = {}
        if self.retry_after_seconds is not None:
            headers["retry-after"] = str(self.retry_after_seconds)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.code == "insufficient_quota":
            # SDKs would wait for days, or ask again in seconds.
            headers["x-should-retry"] = "false"
        if self.status == 408:
            # What may still come of the request is nobody's.
            headers["connection"] = "close"
        return Response(
            orjson.dumps(self.body), self.status, headers, media_type="application/json"
        )


async def respond_with_error(_request: Request, error: Exception) -> Response:
    """Starlette exception handler for :class:`ApiError`."""
    if not isinstance(error, ApiError):
        raise error
    return error.response


def dotted(location: Location) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def conflict(param: str, message: str) -> PydanticCustomError:
    """What a model validator raises about ``param``, one of several fields that do not go together."""
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})


def unsupported(
    param: str, reason: str, *, value: str | None = None, tells_kind: bool = False
) -> PydanticCustomError:
    """What a model validator raises about ``param``, a field that is known but not honoured.

    ``value``: what is not honoured, where other values are. ``tells_kind``: without that field, all
    of the object means nothing.
    """
    context = {"param": param, "message": reason, "value": value, "tells_kind": tells_kind}
    return PydanticCustomError("unsupported", "{message}", context)


def from_validation(error: ValidationError) -> ApiError:
    """The first problem pydantic found in a request body, as a 400 that names the field."""
    errors = error.errors(include_url=False, include_context=True, include_input=False)
    first = errors[0]
    if first["loc"] and first["loc"][-1] == "str":
        # No text, but the field may have other forms: of those, the one that it came closest to.
        forms = (each for each in errors if each["loc"][0] == first["loc"][0])
        first = max(forms, key=lambda each: len(each["loc"]))
    kind, message = first["type"], first["msg"]
    # Names of union members and tags (as in `str`, `list[...]`) are pydantic's, not the client's.
    location = tuple(part for part in first["loc"] if _is_field(part))
    if kind == "extra_forbidden":
        # The client's own word, whatever it looks like.
        location = (*(part for part in first["loc"][:-1] if _is_field(part)), first["loc"][-1])
    elif kind in ("conflict", "unsupported"):
        location = (*location, first["ctx"]["param"])
    where = dotted(location)[:_SHOWN_CHARACTERS]
    if kind == "unsupported" and first["ctx"]["tells_kind"]:
        location = location[:-1]

    def refusal(message: str, code: str) -> ApiError:
        return ApiError(
            400, f"{message}.", param=where if location else None, location=location, code=code
        )

    if kind == "missing":
        return refusal(f"'{where}' is required", "missing_required_parameter")
    if kind == "extra_forbidden":
        return refusal(f"Unknown parameter: '{where}'", UNKNOWN_PARAMETER)
    if kind == "unsupported":
        value = first["ctx"]["value"]
        what = f"'{where}' is" if value is None else f"'{where}': {value!r} is"
        return refusal(f"{what} not supported: {message}", UNSUPPORTED_PARAMETER)
    if kind == "conflict":
        subject = f"'{where}': " if len(location) > 1 else ""
        return refusal(f"{subject}{message}", "invalid_value")
    if kind == "too_long" and first["ctx"]["field_type"] == "List":
        return refusal(
            f"'{where}': at most {first['ctx']['max_length']} are allowed", "array_above_max_length"
        )
    reason = message.removeprefix("Value error, ")
    if kind in ("model_type", "dict_type"):
        # Pydantic would tell what the type is called here.
        reason = "must be a JSON object"
    subject = f"'{where}': " if where else ""
    return refusal(f"{subject}{reason}", "invalid_value")


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float"))
