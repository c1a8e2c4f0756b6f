"""The engine's HTTP face on loopback: OpenAI's two completion endpoints, and what the gateway needs."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import asdict

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.llamacpp.engine import Engine
from serving.llamacpp.sequence import Failed, Job, TextDelta
from serving.protocol.errors import ApiError, respond_with_error
from serving.protocol.requests import GenerationRequest, parse_chat, parse_completion
from serving.protocol.responses import Choice, Envelope, model_json
from serving.protocol.sse import (
    DONE,
    ClientDisconnected,
    EventStream,
    event,
    respond_to_nobody,
    while_connected,
)


def create_app(engine: Engine, api_key: str | None) -> Starlette:
    """The ASGI application; with an ``api_key`` every path asks for it."""
    server = _Server(engine)
    return Starlette(
        routes=[
            Route("/health", server.health, methods=["GET"]),
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/internal/load", server.load, methods=["GET"]),
            Route("/internal/cancel/{request_id}", server.cancel, methods=["POST"]),
        ],
        middleware=[Middleware(_RequireKey, api_key=api_key)] if api_key else [],
        exception_handlers={
            ApiError: respond_with_error,
            ClientDisconnected: respond_to_nobody,
            ClientDisconnect: respond_to_nobody,
            Exception: _respond_with_bug,
        },
    )


def _respond_with_bug(_request: Request, _error: Exception) -> Response:
    # Starlette logs the traceback.
    return ApiError(500, "Something failed inside the engine; its log has more.").response


class _RequireKey:
    """Turns away requests without the launch's key: other local users are not the gateway."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "This engine takes requests from its gateway only.")
                app = error.response
        await app(scope, receive, send)


def _json(payload: object) -> Response:
    return Response(orjson.dumps(payload), media_type="application/json")


class _Server:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}

    async def health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._engine.alive else 500)

    async def models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [model_json(self._engine.options.served_name, 0)]})

    async def load(self, _request: Request) -> Response:
        return _json(asdict(self._engine.load()))

    async def cancel(self, request: Request) -> Response:
        """End a request early; its stream then ends in the ordinary way, with its usage so far."""
        job = self._jobs.get(request.path_params["request_id"])
        if job is not None:
            self._engine.cancel(job)
        return Response(status_code=204)

    async def chat_completions(self, http: Request) -> Response:
        request = parse_chat(await http.body())
        return await self._answer(http, request, await self._engine.chat(request), chat=True)

    async def completions(self, http: Request) -> Response:
        request = parse_completion(await http.body())
        return await self._answer(http, request, await self._engine.complete(request), chat=False)

    async def _answer(
        self, http: Request, request: GenerationRequest, job: Job, *, chat: bool
    ) -> Response:
        envelope = Envelope.create(
            chat=chat,
            model=self._engine.options.served_name,
            system_fingerprint=self._engine.system_fingerprint,
            usage_in_chunks=request.wants_usage_chunk,
        )
        request_id = http.headers.get("x-request-id", envelope.id)
        self._jobs[request_id] = job

        def release() -> None:
            self._engine.release(job)
            self._jobs.pop(request_id, None)

        if request.stream:
            return EventStream(self._stream(request, job, envelope), on_close=release)
        try:
            return await while_connected(http.receive, self._whole(request, job, envelope))
        finally:
            release()

    async def _stream(
        self, request: GenerationRequest, job: Job, envelope: Envelope
    ) -> AsyncGenerator[bytes, None]:
        introduced: set[int] = set()
        sent_characters: Counter[int] = Counter()
        async for output in self._engine.events(job):
            index = output.sequence.index
            if isinstance(output, Failed):
                yield event(ApiError(500, output.message, code="engine_error").body)
                return
            opening = b""
            if envelope.chat and index not in introduced:
                introduced.add(index)
                opening = event(envelope.role_chunk(index))
            if isinstance(output, TextDelta):
                offset = sent_characters[index]
                sent_characters[index] += len(output.text)
                chunk = envelope.text_chunk(index, output.text, output.logprobs, offset)
                yield opening + event(chunk)
            elif output.reason is not None:
                yield opening + event(envelope.finish_chunk(index, output.reason))
        closing = DONE
        if request.wants_usage_chunk:
            usage = envelope.usage_chunk(job.usage(request.choices), job.timings())
            closing = event(usage) + closing
        yield closing

    async def _whole(self, request: GenerationRequest, job: Job, envelope: Envelope) -> Response:
        choices = [Choice(sequence.index) for sequence in job.sequences]
        async for output in self._engine.events(job):
            choice = choices[output.sequence.index]
            if isinstance(output, Failed):
                raise ApiError(500, output.message, code="engine_error")
            if isinstance(output, TextDelta):
                choice.text += output.text
                choice.logprobs += output.logprobs
            else:
                choice.finish_reason = output.reason or "stop"
        return _json(envelope.body(choices, job.usage(request.choices), job.timings()))
