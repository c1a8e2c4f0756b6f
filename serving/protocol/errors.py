"""Errors as OpenAI's clients expect them: a status, and a body their SDK turns into an exception class."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

# OpenAI's names for these; other 4xx are invalid_request_error, 5xx api_error.
_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """A request that ends in an error response.

    Args:
        status: HTTP status.
        message: For the person who sent the request: what was wrong and what to do.
        code: Machine-readable reason, such as ``model_not_found``.
        param: The request field at fault, such as ``messages[0].role``.
        retry_after_seconds: Sent as ``Retry-After`` when the same request may succeed later.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
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
        return Response(
            orjson.dumps(self.body), self.status, headers, media_type="application/json"
        )


async def respond_with_error(_request: Request, error: Exception) -> Response:
    """Starlette exception handler for :class:`ApiError`."""
    if not isinstance(error, ApiError):
        raise error
    return error.response


def dotted(location: tuple[int | str, ...]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def conflict(param: str, message: str) -> PydanticCustomError:
    """What a model validator raises about ``param``, one of several fields that do not go together."""
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})


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
    where = dotted(location)
    if kind == "missing":
        return ApiError(
            400, f"'{where}' is required.", param=where, code="missing_required_parameter"
        )
    if kind == "extra_forbidden":
        return ApiError(
            400, f"Unknown parameter: '{where}'.", param=where, code="unknown_parameter"
        )
    if kind == "conflict":
        param = dotted((*location, first["ctx"]["param"]))
        subject = f"'{param}': " if location else ""
        return ApiError(400, f"{subject}{message}.", param=param, code="invalid_value")
    reason = message.removeprefix("Value error, ")
    subject = f"'{where}': " if where else ""
    return ApiError(400, f"{subject}{reason}.", param=where or None, code="invalid_value")


def _is_field(part: int | str) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "float"))
