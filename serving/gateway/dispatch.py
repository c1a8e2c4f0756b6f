"""Gets a request answered by one of several: a route's models are asked in turn, until one begins to answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from serving.gateway.attempt import PASSED_ON, Attempt, PassedOn
from serving.gateway.balancing import Balancer, Marks
from serving.gateway.caller import Caller
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.gateway.routing import Backend, Candidate, Route
from serving.gateway.translation import Translation
from serving.protocol.errors import ApiError
from serving.protocol.requests import ModelRequest

MODEL_HEADER = "x-rigserve-model"
SERVED_AS_HEADER = "x-rigserve-served-as"


@dataclass(slots=True)
class Plan:
    """Whom to ask for a route's request, in turn; it is ready for the first of them.

    ``prepare`` makes it ready for another, and raises :class:`ApiError` (400) if that one cannot serve it.
    """

    route: Route
    candidates: Sequence[Candidate]
    marks: Marks
    prepare: Callable[[Candidate], ModelRequest]


Destination = Backend | Plan
_Try = Callable[[Backend, ModelRequest, Attempt], Awaitable[Response]]


class Dispatcher:
    """Sends requests where they are to go."""

    def __init__(self, relay: Relay, meter: Meter, balancer: Balancer) -> None:
        self.relay = relay
        self.balancer = balancer
        self._meter = meter

    async def forward(
        self,
        caller: Caller,
        destination: Destination,
        body: ModelRequest,
        translation: Translation | None = None,
    ) -> Response:
        """As :meth:`Relay.forward`."""
        if not isinstance(destination, Plan):
            return await self.relay.forward(caller, destination, body, translation)
        return await self._in_turn(
            caller,
            destination,
            body,
            lambda *to: self.relay.forward(caller, to[0], to[1], translation, to[2]),
        )

    async def ask(self, caller: Caller, destination: Destination, body: ModelRequest) -> Response:
        """As :meth:`Relay.ask`."""
        if not isinstance(destination, Plan):
            return await self.relay.ask(caller, destination, body)
        return await self._in_turn(
            caller, destination, body, lambda *to: self.relay.ask(caller, *to)
        )

    async def _in_turn(
        self, caller: Caller, plan: Plan, body: ModelRequest, attempt_at: _Try
    ) -> Response:
        began_at = time.monotonic()
        refusals: list[tuple[Candidate, ApiError]] = []
        # Between two tries the request is still under way.
        with self.relay.busy():
            for position, candidate in enumerate(plan.candidates):
                is_last = position + 1 == len(plan.candidates)
                attempt = Attempt(
                    route=plan.route.name,
                    served_as=candidate.role.value,
                    began_at=began_at,
                    max_wait_seconds=None if is_last else plan.route.max_wait_seconds,
                    is_last=is_last,
                )
                try:
                    asked = body if position == 0 else plan.prepare(candidate)
                except ApiError as error:
                    refusals.append((candidate, error))
                    continue
                try:
                    response = await attempt_at(candidate.backend, asked, attempt)
                except PassedOn as passed:
                    refusals.append((candidate, passed.error))
                    reason = str(passed.error.code)
                    self._meter.passed_on(attempt.route, candidate.backend.model.name, reason)
                    continue
                self.balancer.memory.keep(plan.marks, candidate.place)
                response.headers[MODEL_HEADER] = candidate.backend.model.name
                response.headers[SERVED_AS_HEADER] = candidate.role.value
                return response
        refusal = _nobody(plan.route.name, refusals)
        self._meter.unmetered(plan.route.name, caller.endpoint, refusal.status)
        raise refusal


def _nobody(route: str, refusals: Sequence[tuple[Candidate, ApiError]]) -> ApiError:
    """Why none of a route's models took a request; the first that may be asked again says when."""
    # That one cannot serve it is not all: others would, in time.
    *_, last = [error for _, error in refusals if error.status in PASSED_ON]
    if len(refusals) == 1:
        return last
    spent = [each for _, each in refusals if each.code == "budget_exhausted"]
    told = " ".join(error.message for _, error in refusals)
    waits = [each.retry_after_seconds for _, each in refusals if each.retry_after_seconds]
    return ApiError(
        last.status,
        f"No model of '{route}' could take the request. {told}",
        code=(spent or [last])[0].code,
        retry_after_seconds=min(waits, default=None),
    )
