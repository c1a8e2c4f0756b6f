"""Carries a request to its engine and the answer back, and sees to it that every request is metered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import orjson
from starlette.responses import Response

from serving.cost.ledger import UsageRecord
from serving.engines.remote import Remote
from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.admission import Admission, Ticket
from serving.gateway.attempt import DIRECT, PASSED_ON, Attempt, PassedOn, refusal_of
from serving.gateway.caller import (
    DEADLINE_HEADER,
    HOPS_HEADER,
    MAX_HOPS,
    SPILL_OVER_HEADER,
    Caller,
)
from serving.gateway.engine_answer import (
    NOTHING_USED,
    bad_answer,
    body_of,
    engine_gone,
    final_of,
    object_of,
    relayed,
)
from serving.gateway.engine_call import EngineCall, EngineUnreachable
from serving.gateway.identity import Identity
from serving.gateway.limits import Limits, Reservation
from serving.gateway.metering import Meter, Request
from serving.gateway.remote_call import Clearance, NotStarted, RemoteCall, clear
from serving.gateway.routing import Backend, adapter_of, adapters_of, endpoint_of
from serving.gateway.spending import Spending
from serving.gateway.stream import StreamTap
from serving.gateway.token_bound import expected_tokens, token_bound
from serving.gateway.tracing import Trace
from serving.gateway.translation import Translation, translated
from serving.gateway.wires import wire_of, written
from serving.protocol.errors import ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    ModelRequest,
    StreamOptions,
)
from serving.protocol.sse import (
    CLIENT_CLOSED_REQUEST,
    DONE,
    ClientDisconnected,
    EventStream,
    event,
    while_connected,
)
from serving.protocol.tenancy import Tenancy

_log = logging.getLogger(__name__)
# Silent unless the operator asks for it; see serving/logs.py.
_prompts = logging.getLogger("rigserve.prompts")
_prompts.propagate = False

# How long an engine may take to hand over the usage of a request whose client has left.
_SETTLE_SECONDS = 5.0
_CANCEL_INTERVAL_SECONDS = 0.1
# How long it may take until it is noticed that a process has ended, which answers nobody any more.
_NOTICE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Place:
    """A request's place at an engine. It must start within ``start_within_seconds``, if anybody said so."""

    ticket: Ticket
    endpoint: Endpoint
    clearance: Clearance | None
    start_within_seconds: float | None


class Relay:
    """Sends requests to engines over one pool of connections."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        meter: Meter,
        limits: Limits,
        admission: Admission,
        spending: Spending | None = None,
    ) -> None:
        self._session = session
        self._meter = meter
        self._limits = limits
        self.admission = admission
        self.spending = spending or Spending()
        self._settling: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.open_requests = 0
        self._holds = 0
        # Of each request at an engine, by its identity.
        self._tickets: dict[int, Ticket] = {}

    async def forward(
        self,
        caller: Caller,
        engine: Backend,
        body: ModelRequest,
        translation: Translation | None = None,
        attempt: Attempt = DIRECT,
    ) -> Response:
        """Answer a request through its engine, in the words of ``translation`` if there is one.

        Raises :class:`ApiError`, or :class:`ClientDisconnected` when nobody waits for the answer any more;
        and :class:`PassedOn` for an ``attempt`` that another may follow.
        """
        sent = self._for_engine(caller, engine, body, attempt)
        has_key = caller.identity.key_id is not None
        bound = token_bound(engine.model, body, sent) if has_key else 0
        reservation = self._reserve(caller, engine, bound)
        request = Request(
            id=caller.request_id,
            endpoint=caller.endpoint,
            model=engine.model,
            adapter=adapter_of(engine, body.model),
            user=body.user or "-",
            identity=caller.identity,
            reservation=reservation,
            streamed=_is_streamed(body),
            trace=caller.log_entry.trace,
            route=attempt.route,
            served_as=attempt.served_as,
            service_tier=_service_tier(caller, body),
        )
        if attempt.began_at is not None:
            request.arrived_unix -= request.arrived_at - attempt.began_at
            request.arrived_at = attempt.began_at
        self.open_requests += 1
        self._idle.clear()
        try:
            place = await self._enter(caller, engine, body, _units(body), sent, attempt)
        except BaseException:
            self._close()
            if reservation:
                reservation.withdraw()
            raise
        request.queue_seconds = (
            place.ticket.queue_seconds
            if attempt.began_at is None
            else time.monotonic() - attempt.began_at
        )
        self._tickets[id(request)] = place.ticket
        if _prompts.isEnabledFor(logging.INFO):
            written_id = orjson.dumps(caller.request_id).decode()
            _prompts.info('{"request_id":%s,"body":%s}', written_id, sent.decode())
        caller.log_entry.is_metered = True
        self._meter.started(request, body)
        if place.clearance:
            request.purchase = place.clearance.purchase

        async def answered(place: _Place, attempt: Attempt) -> Response:
            call = self._call(engine, place, body, sent, caller, request.trace)
            try:
                if isinstance(body, GenerationRequest) and body.stream:
                    tap = StreamTap(forward_usage=body.wants_usage_chunk or translation is not None)
                    return await self._stream(caller, call, request, tap, translation, attempt)
                return await self._whole(caller, call, request, translation, attempt)
            except PassedOn:
                caller.log_entry.is_metered = False
                raise

        try:
            return await answered(place, attempt)
        except EngineUnreachable as error:
            assert isinstance(engine, Engine)
            place = await self._enter_again(caller, engine, request, place, error)
            return await answered(place, replace(attempt, is_repeated=True))

    async def ask(
        self, caller: Caller, engine: Backend, body: ModelRequest, attempt: Attempt = DIRECT
    ) -> Response:
        """Answer a request that uses no tokens through its engine: it is counted, but not in the ledger.

        Raises as :meth:`forward` does.
        """
        sent = self._for_engine(caller, engine, body, attempt)
        reservation = self._reserve(caller, engine, 0)
        try:
            place = await self._enter(caller, engine, body, 0, sent, attempt)
        except BaseException:
            if reservation:
                reservation.withdraw()
            raise
        call = self._call(engine, place, body, sent, caller)
        status: int | None = CLIENT_CLOSED_REQUEST
        try:
            answer, payload = await while_connected(caller.receive, call.answer())
            if attempt.may_pass_on and answer.status in PASSED_ON:
                raise refusal_of(engine.model.served_name, answer, payload)
            object_of(engine, payload)
            status = answer.status
        except ApiError as error:
            status = error.status
            if attempt.may_pass_on and status in PASSED_ON:
                status = None
                raise PassedOn(error) from error
            raise
        finally:
            place.ticket.release()
            if reservation and status is None:
                reservation.withdraw()
            elif reservation:
                reservation.settle(0, 0.0)
            if status is not None:
                self._meter.unmetered(engine.model.served_name, caller.endpoint, status)
        return relayed(engine, answer, payload)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While this lasts, :meth:`settled` waits."""
        self._holds += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._holds -= 1
            self._rest()

    async def settled(self) -> None:
        """Wait until every request, also those whose clients have left, is metered."""
        await self._idle.wait()

    async def _enter(
        self,
        caller: Caller,
        engine: Backend,
        body: ModelRequest,
        units: int,
        sent: bytes,
        attempt: Attempt,
    ) -> _Place:
        """Wait for a place at an engine; counts what is turned away, and who leaves while waiting.

        Raises as :meth:`forward` does; then the place is given back.
        """
        ticket, status = None, CLIENT_CLOSED_REQUEST
        try:
            deadline_seconds = caller.deadline_seconds()
            if attempt.may_pass_on:
                deadline_seconds = attempt.deadline_seconds(deadline_seconds)
            if caller.hops >= MAX_HOPS and isinstance(engine, Remote):
                raise _has_come_far(engine)
            owner = _tenancy_of(body, caller.identity)
            tokens = expected_tokens(body, sent)
            ticket = self.admission.enter(
                engine, owner, units, deadline_seconds, tokens, adapter_of(engine, body.model)
            )
            if ticket.is_waiting:
                await while_connected(caller.receive, ticket.wait())
            clearance = None
            if isinstance(engine, Remote):
                clearance = clear(engine, body, sent, self.spending if units else None)
            left_seconds = None
            if deadline_seconds is not None:
                left_seconds = max(0.0, deadline_seconds - ticket.queue_seconds)
            return _Place(ticket, endpoint_of(engine), clearance, left_seconds)
        except BaseException as error:
            if ticket is not None:
                ticket.release()
            if isinstance(error, ApiError):
                if attempt.may_pass_on and error.status in PASSED_ON:
                    raise PassedOn(error) from error
                status = error.status
            self._meter.unmetered(engine.model.served_name, caller.endpoint, status)
            raise

    async def _enter_again(
        self, caller: Caller, engine: Engine, request: Request, place: _Place, error: ApiError
    ) -> _Place:
        """Have a request wait anew for an engine whose process was gone. Raises ``error`` if it is not back in time.

        Then, and when its client leaves, it is metered.
        """
        before = place.ticket
        try:
            # Until then it keeps its place, which others would be given for nothing.
            async with asyncio.timeout(_NOTICE_SECONDS):
                await while_connected(caller.receive, engine.leaves(place.endpoint))
            before.release()
            ticket = self.admission.enter(
                *(engine, before.owner, before.units),
                max(0.0, before.deadline_at - self.admission.monotonic()),
                *(before.tokens, before.adapter),
            )
            self._tickets[id(request)] = ticket
            if ticket.is_waiting:
                await while_connected(caller.receive, ticket.wait())
            endpoint = endpoint_of(engine)
        except BaseException as failure:
            is_refused = isinstance(failure, ApiError | TimeoutError)
            status = error.status if is_refused else CLIENT_CLOSED_REQUEST
            self._finish(request, status, NOTHING_USED)
            if is_refused:
                raise error from failure
            raise
        request.queue_seconds = time.monotonic() - request.arrived_at
        return replace(place, ticket=ticket, endpoint=endpoint)

    def _call(
        self,
        engine: Backend,
        place: _Place,
        body: ModelRequest,
        sent: bytes,
        caller: Caller,
        trace: Trace | None = None,
    ) -> EngineCall | RemoteCall:
        trace_headers = trace.headers if trace else {}
        owner = _tenancy_of(body, caller.identity)
        if isinstance(engine, Remote):
            assert place.clearance is not None
            return RemoteCall(
                *(self._session, engine, body, sent, place.clearance.passage),
                streamed=_is_streamed(body),
                rig_headers={**trace_headers, **_rig_headers(caller, owner, place)},
            )
        headers = {**owner.to_headers(), **trace_headers}
        wire = wire_of(engine.model)
        return wire.call(self._session, engine, place.endpoint, body, sent, headers)

    def _for_engine(
        self, caller: Caller, engine: Backend, body: ModelRequest, attempt: Attempt
    ) -> bytes:
        """As :func:`_for_engine`; counts what is turned away. Raises as :meth:`forward` does."""
        try:
            return _for_engine(engine, body, _tenancy_of(body, caller.identity))
        except ApiError as error:
            if attempt.may_pass_on:
                raise PassedOn(error) from error
            self._meter.unmetered(engine.model.served_name, caller.endpoint, error.status)
            raise

    def _reserve(self, caller: Caller, engine: Backend, tokens: int) -> Reservation | None:
        """As :meth:`Limits.reserve`; counts what is turned away."""
        try:
            return self._limits.reserve(caller.identity, tokens)
        except ApiError as error:
            self._meter.unmetered(engine.model.served_name, caller.endpoint, error.status)
            self._meter.refused(str(error.code))
            raise

    async def _whole(
        self,
        caller: Caller,
        call: EngineCall | RemoteCall,
        request: Request,
        translation: Translation | None,
        attempt: Attempt,
    ) -> Response:
        answering = asyncio.create_task(call.answer())
        try:
            await while_connected(caller.receive, _finished(answering))
        except (ClientDisconnected, asyncio.CancelledError):
            self._settle(self._settle_whole(call, request, answering))
            raise
        try:
            answer, payload = answering.result()
            if attempt.may_pass_on and answer.status in PASSED_ON:
                self._withdraw(request)
                raise PassedOn(refusal_of(call.engine.model.served_name, answer, payload))
            if request.trace:
                request.trace.saw(payload)
            final = final_of(call.engine, answer, payload)
            response = relayed(call.engine, answer, payload, translation)
        except ApiError as error:
            raise self._failed(request, error, attempt) from error
        record = self._finish(request, answer.status, final)
        response.headers.update(self._meter.bill(record).headers)
        return response

    async def _settle_whole(
        self,
        call: EngineCall | RemoteCall,
        request: Request,
        answering: asyncio.Task[tuple[aiohttp.ClientResponse, bytes]],
    ) -> None:
        """Meter a request whose client has left before the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                # An engine that does not know the request yet cannot cancel it: tell it again.
                while not answering.done():
                    await call.cancel()
                    await asyncio.wait((answering,), timeout=_CANCEL_INTERVAL_SECONDS)
        final = None
        if not answering.done():
            answering.cancel()
        elif not answering.cancelled() and answering.exception() is None:
            with contextlib.suppress(ApiError):
                final = final_of(call.engine, *answering.result())
        self._finish(request, CLIENT_CLOSED_REQUEST, final)

    async def _stream(
        self,
        caller: Caller,
        call: EngineCall | RemoteCall,
        request: Request,
        tap: StreamTap,
        translation: Translation | None,
        attempt: Attempt,
    ) -> Response:
        opening = asyncio.create_task(_opened(call))
        try:
            await while_connected(caller.receive, _finished(opening))
        except (ClientDisconnected, asyncio.CancelledError):
            self._settle(self._settle_opening(call, request, opening))
            raise
        try:
            upstream, payload = opening.result()
            if upstream.status != 200:
                if attempt.may_pass_on and upstream.status in PASSED_ON:
                    self._withdraw(request)
                    raise PassedOn(refusal_of(call.engine.model.served_name, upstream, payload))
                final = final_of(call.engine, upstream, payload)
                response = relayed(call.engine, upstream, payload, translation)
                self._finish(request, upstream.status, final)
                return response
            if upstream.content_type != "text/event-stream":
                upstream.close()
                raise bad_answer(call.engine.model.served_name)
        except (ApiError, aiohttp.ClientError) as error:
            refusal = error if isinstance(error, ApiError) else engine_gone(call.engine)
            raise self._failed(request, refusal, attempt) from error
        chunks = self._chunks(call, request, upstream, tap)
        return EventStream(
            translated(chunks, translation, tap.fail) if translation else chunks,
            on_close=lambda: self._settle(self._settle_stream(call, request, upstream, tap)),
        )

    async def _chunks(
        self,
        call: EngineCall | RemoteCall,
        request: Request,
        upstream: aiohttp.ClientResponse,
        tap: StreamTap,
    ) -> AsyncGenerator[bytes, None]:
        try:
            async for data in call.chunks(upstream):
                before, was_finished = tap.text_events, tap.finished
                chunk = tap.feed(data)
                if request.trace:
                    request.trace.saw(chunk)
                self._meter.streamed(request, tap.text_events - before)
                if tap.finished and not was_finished:
                    # Without a wait in between: a stream that is finished is metered.
                    chunk += self._finish_stream(request, tap) + DONE
                if chunk:
                    yield chunk
        except aiohttp.ClientError as error:
            _log.warning("%s: the engine broke off a stream: %s", call.engine.model.name, error)
        if not tap.finished and not tap.failed:
            tap.fail()
            yield event(engine_gone(call.engine).body)

    async def _settle_opening(
        self,
        call: EngineCall | RemoteCall,
        request: Request,
        opening: asyncio.Task[tuple[aiohttp.ClientResponse, bytes]],
    ) -> None:
        """Meter a stream whose client has left before it began."""
        if call.hangs_up:
            await call.cancel()
        await asyncio.wait((opening,), timeout=_SETTLE_SECONDS)
        if opening.done() and not opening.cancelled() and opening.exception() is None:
            upstream, _ = opening.result()
            await self._settle_stream(call, request, upstream, StreamTap(forward_usage=False))
        else:
            opening.cancel()
            self._finish(request, CLIENT_CLOSED_REQUEST, None)

    async def _settle_stream(
        self,
        call: EngineCall | RemoteCall,
        request: Request,
        upstream: aiohttp.ClientResponse,
        tap: StreamTap,
    ) -> None:
        """Meter a stream that is over; if its client left early, the engine is told and still heard out."""
        if tap.finished:
            upstream.close()
            return
        status = 500
        if not tap.failed:
            status = CLIENT_CLOSED_REQUEST
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(_SETTLE_SECONDS):
                    await call.cancel()
                    async for data in upstream.content.iter_any():
                        tap.feed(data)
            if tap.final is None:
                tap.feed(call.last_words())
        upstream.close()
        self._finish(request, status, tap.final, tap.text_events)

    def _finish_stream(self, request: Request, tap: StreamTap) -> bytes:
        """Meter a stream that was read to its end; gives what its client is told of the cost."""
        status = 500 if tap.failed else 200
        record = self._finish(request, status, tap.final, tap.text_events)
        return self._meter.bill(record).comment

    def _settle(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    def _finish(
        self, request: Request, status: int, final: dict[str, Any] | None, chunks: int = 0
    ) -> UsageRecord:
        record = self._meter.finished(request, status, final, chunks)
        tokens = record.prompt_tokens - record.cached_tokens + record.completion_tokens
        self._tickets.pop(id(request)).release(tokens)
        self._close()
        if request.reservation:
            request.reservation.settle(record.prompt_tokens + record.completion_tokens, record.usd)
        return record

    def _failed(self, request: Request, error: ApiError, attempt: Attempt) -> ApiError | PassedOn:
        """What to raise for a request that its engine has failed; it is metered, unless it is asked again."""
        if isinstance(error, EngineUnreachable) and attempt.may_repeat:
            return error
        passes_on = attempt.may_pass_on and error.status in PASSED_ON
        if passes_on and (not request.purchase or isinstance(error, NotStarted)):
            self._withdraw(request)
            return PassedOn(error)
        # Whoever is paid may have begun, and will ask for the money.
        final = NOTHING_USED if isinstance(error, NotStarted) else None
        self._finish(request, error.status, final)
        return PassedOn(error) if passes_on else error

    def _withdraw(self, request: Request) -> None:
        """A request that went to its engine is another's after all."""
        self._meter.withdrawn(request)
        self._tickets.pop(id(request)).release()
        self._close()
        if request.reservation:
            request.reservation.withdraw()
        if request.purchase:
            request.purchase.settle(0.0)

    def _close(self) -> None:
        self.open_requests -= 1
        self._rest()

    def _rest(self) -> None:
        if not self.open_requests and not self._holds:
            self._idle.set()


async def _opened(call: EngineCall | RemoteCall) -> tuple[aiohttp.ClientResponse, bytes]:
    """A stream that is open, with nothing of it; of what is an error instead, all."""
    upstream = await call.open()
    return upstream, b"" if upstream.status == 200 else await body_of(upstream)


async def _finished(task: asyncio.Task[Any]) -> None:
    """Wait for a task without ending it when the wait is given up."""
    await asyncio.wait((task,))


def _has_come_far(remote: Remote) -> ApiError:
    return ApiError(
        503,
        f"The request has come through {MAX_HOPS} rigs, and is not sent on to '{remote.model.name}'; "
        "do their routes lead in a circle?",
        code="too_many_hops",
    )


def _is_streamed(body: ModelRequest) -> bool:
    return isinstance(body, GenerationRequest) and bool(body.stream)


def _units(body: ModelRequest) -> int:
    """How many slots of its engine a request takes."""
    if isinstance(body, CompletionRequest):
        return len(body.prompts) * (body.n or 1)
    return (body.n or 1) if isinstance(body, ChatCompletionRequest) else 1


def _service_tier(caller: Caller, body: ModelRequest) -> str:
    """As what a commercial API would sell it."""
    if caller.is_batch:
        return "batch"
    return "flex" if _tenancy_of(body, caller.identity).priority == "batch" else "default"


def _tenancy_of(body: ModelRequest, identity: Identity) -> Tenancy:
    """A request may ask for less priority than its owner could have."""
    asks_for_less = isinstance(body, GenerationRequest) and body.priority == "batch"
    return Tenancy(
        tenant=identity.tenant if identity.key_id else body.user or "-",
        weight=identity.weight,
        priority="batch" if asks_for_less else identity.priority,
    )


def _rig_headers(caller: Caller, owner: Tenancy, place: _Place) -> dict[str, str]:
    """What holds for a request also at the next rig, which has queues and routes of its own."""
    headers = {HOPS_HEADER: str(caller.hops + 1)}
    if place.start_within_seconds is not None:
        headers[DEADLINE_HEADER] = f"{place.start_within_seconds:.3f}"
    # A key's list of models names those of this rig.
    has_list = caller.identity.models is not None
    if not caller.may_spill or owner.priority == "batch" or has_list:
        headers[SPILL_OVER_HEADER] = "never"
    return headers


def _for_engine(engine: Backend, body: ModelRequest, owner: Tenancy) -> bytes:
    """The request as the engine gets it: a name it knows, and usage at the end of a stream.

    Raises :class:`ApiError` (503) for an adapter that has gone since it was found: its base is no answer for it.
    """
    changes: dict[str, Any] = {}
    if isinstance(engine, Remote):
        changes["model"] = engine.name_there
        is_rig = engine.model.dialect == "rigserve"
        if is_rig and owner.priority == "batch" and isinstance(body, ChatCompletionRequest):
            # What gives way here gives way there.
            changes["service_tier"] = "flex"
    elif body.model in (engine.model.served_name, *engine.model.aliases):
        changes["model"] = engine.model.served_name
    elif body.model not in adapters_of(engine):
        raise ApiError(
            503,
            f"The model '{body.model}' was removed a moment ago; ask again.",
            code="model_not_ready",
            retry_after_seconds=1,
        )
    if _is_streamed(body):
        changes["stream_options"] = StreamOptions(include_usage=True)
    sent = body.model_copy(update=changes)
    if isinstance(engine, Remote):
        return written(engine.model, sent)
    return wire_of(engine.model).written(engine.model, sent)
