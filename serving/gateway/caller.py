"""Who waits for an answer."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest
from starlette.types import Message, Receive

from serving.gateway.access_log import Entry
from serving.gateway.identity import Identity
from serving.protocol.errors import ApiError

DEADLINE_HEADER = "x-rigserve-deadline-seconds"
# With "never", a client keeps its request from models that cost money.
SPILL_OVER_HEADER = "x-rigserve-spill-over"
# From rig to rig: through how many a request has come.
HOPS_HEADER = "x-rigserve-hops"
# Rigs that are each other's replicas would else send a request round for as long as none can take it.
MAX_HOPS = 4
_HOPS = re.compile("[0-9]{1,3}")


async def _never() -> Message:
    """What is received from a client that is not there: it does not hang up either."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass(frozen=True, slots=True)
class Caller:
    """Who waits for an answer. ``endpoint`` is what it is metered as."""

    request_id: str
    endpoint: str
    identity: Identity
    receive: Receive = _never
    # What the client says of when its answer must begin.
    deadline: str | None = None
    hops: int = 0
    log_entry: Entry = field(default_factory=Entry)
    # Whether it is a line of a batch.
    is_batch: bool = False
    # Whether a route may send it to models that cost money.
    may_spill: bool = True

    @staticmethod
    def of(http: HttpRequest) -> Caller:
        """The client of a request, whose body has been read."""
        state = http.state
        deadline = http.headers.get(DEADLINE_HEADER)
        told = http.headers.get(HOPS_HEADER, "0")
        hops = int(told) if _HOPS.fullmatch(told) else MAX_HOPS
        owner = (state.request_id, http.url.path, state.identity)
        return Caller(
            *(*owner, http.receive, deadline, hops, state.log_entry),
            may_spill=SPILL_OVER_HEADER not in http.headers,
        )

    def deadline_seconds(self) -> float | None:
        """In what time its answer must begin; raises :class:`ApiError` (400) for what is no time."""
        if self.deadline is None:
            return None
        try:
            seconds = float(self.deadline)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise ApiError(
                400,
                f"The header {DEADLINE_HEADER} must be a number of seconds, 0 or more; got {self.deadline[:100]!r}.",
                param=DEADLINE_HEADER,
                code="invalid_value",
            )
        return seconds
