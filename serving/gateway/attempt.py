"""One of several tries to have a request answered, and when it is somebody else's turn."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import aiohttp
import orjson

from serving.protocol.errors import ApiError

# A server that is not there, has no room, or whose own server did not answer; of remotes also one that sets us limits.
PASSED_ON = frozenset((429, 502, 503, 504))
# It may be a date instead, or anything.
_SECONDS = re.compile("[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to have a route's request answered. The request has been under way since ``began_at``.

    It may wait for its start for ``max_wait_seconds`` at most; None is as long as it can.
    """

    route: str = "-"
    served_as: str = "-"
    began_at: float | None = None
    max_wait_seconds: float | None = None
    # Whether there is nobody else to be asked after it.
    is_last: bool = False
    # Whether it has been to an engine already whose process was gone, and that was sent nothing of it.
    is_repeated: bool = False

    @property
    def may_repeat(self) -> bool:
        """Whether it may go to such an engine once more, when that is back."""
        return (self.is_last or not self.may_pass_on) and not self.is_repeated

    @property
    def may_pass_on(self) -> bool:
        """Whether others can be asked when this one fails."""
        return self.began_at is not None

    @property
    def waited_seconds(self) -> float:
        """What has gone by before it."""
        return 0.0 if self.began_at is None else time.monotonic() - self.began_at

    def deadline_seconds(self, asked_seconds: float | None) -> float | None:
        """In what time it must start, if its client gave it ``asked_seconds`` in all."""
        left = None if asked_seconds is None else max(0.0, asked_seconds - self.waited_seconds)
        limits = [each for each in (left, self.max_wait_seconds) if each is not None]
        return min(limits, default=None)


# A request for a model, not for a route.
DIRECT = Attempt()


class PassedOn(Exception):
    """An attempt failed before a byte of the answer was there: another may be made elsewhere."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def refusal_of(model: str, answer: aiohttp.ClientResponse, payload: bytes) -> ApiError:
    """What an engine's error response says."""
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    told = error if isinstance(error, dict) else {}
    retry_after = _SECONDS.fullmatch(answer.headers.get("retry-after", ""))
    return ApiError(
        answer.status,
        str(told.get("message") or f"The model '{model}' answers {answer.status}."),
        # A code of the engine's could be anything, and this becomes a label.
        code=f"status_{answer.status}",
        retry_after_seconds=int(retry_after[0]) if retry_after else None,
    )
