"""The engine's HTTP face on loopback: OpenAI's two completion endpoints, and what the gateway needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.chat.rendering import Reply
from serving.llamacpp.adapters import AdapterFile
from serving.llamacpp.app import application, json_response
from serving.llamacpp.engine import Engine
from serving.llamacpp.grammar import refusal
from serving.llamacpp.sequence import Failed, Finished, Job, TextDelta
from serving.protocol.errors import ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
    read_object,
    validated,
)
from serving.protocol.responses import Choice, Envelope, model_json
from serving.protocol.sse import DONE, EventStream, event, while_connected
from serving.protocol.tenancy import Tenancy


def create_app(engine: Engine, api_key: str | None) -> Starlette:
    """The ASGI application; with an ``api_key`` every path asks for it."""
    server = _Server(engine)
    return application(
        [
            Route("/health", server.health, methods=["GET"]),
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/load_lora_adapter", server.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", server.unload_adapter, methods=["POST"]),
            Route("/v1/chat/completions", server.chat_completions, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/internal/load", server.load, methods=["GET"]),
            Route("/internal/cancel/{request_id}", server.cancel, methods=["POST"]),
        ],
        model=engine.options.served_name,
        kind="a generating model",
        tokenization=engine.tokenization,
        api_key=api_key,
    )


class _Server:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}

    async def health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._engine.alive else 500)

    async def models(self, _request: Request) -> Response:
        base = self._engine.options.served_name
        adapters = [model_json(name, 0, base) for name in self._engine.adapters.names]
        return json_response({"object": "list", "data": [model_json(base, 0), *adapters]})

    async def load_adapter(self, http: Request) -> Response:
        """Serve a LoRA adapter, too; the answer is its entry in the list of models."""
        wanted = validated(LoadAdapterRequest, read_object(await http.body()))
        await self._engine.adapters.add(
            AdapterFile(wanted.lora_name, Path(wanted.lora_path), wanted.scale),
            replace=wanted.load_inplace,
        )
        return json_response(model_json(wanted.lora_name, 0, self._engine.options.served_name))

    async def unload_adapter(self, http: Request) -> Response:
        """Take no more requests for an adapter; those under way finish."""
        name = validated(UnloadAdapterRequest, read_object(await http.body())).lora_name
        self._engine.adapters.remove(name)
        return json_response({"id": name, "object": "model", "deleted": True})

    async def load(self, _request: Request) -> Response:
        return json_response(asdict(self._engine.load()) | self._engine.stats().to_json())

    async def cancel(self, request: Request) -> Response:
        """End a request early; its stream then ends in the ordinary way, with its usage so far."""
        job = self._jobs.get(request.path_params["request_id"])
        if job is not None:
            self._engine.cancel(job)
        return Response(status_code=204)

    async def chat_completions(self, http: Request) -> Response:
        request = ChatCompletionRequest.parse(await http.body())
        job, replies = await self._engine.chat(request, Tenancy.from_headers(http.headers))
        return await self._answer(http, request, job, replies, chat=True)

    async def completions(self, http: Request) -> Response:
        request = CompletionRequest.parse(await http.body())
        job, replies = await self._engine.complete(request, Tenancy.from_headers(http.headers))
        return await self._answer(http, request, job, replies, chat=False)

    async def _answer(
        self,
        http: Request,
        request: GenerationRequest,
        job: Job,
        replies: list[Reply],
        *,
        chat: bool,
    ) -> Response:
        envelope = Envelope(
            chat=chat,
            model=request.model,
            system_fingerprint=self._engine.system_fingerprint,
            usage_in_chunks=request.wants_usage_chunk,
            service_tier=_service_tier(request, job),
        )
        request_id = http.headers.get("x-request-id", envelope.id)
        self._jobs[request_id] = job

        def release() -> None:
            self._engine.release(job)
            self._jobs.pop(request_id, None)

        if request.stream:
            return EventStream(self._stream(request, job, replies, envelope), on_close=release)
        try:
            return await while_connected(http.receive, self._whole(request, job, replies, envelope))
        finally:
            release()

    async def _stream(
        self, request: GenerationRequest, job: Job, replies: list[Reply], envelope: Envelope
    ) -> AsyncGenerator[bytes, None]:
        introduced: set[int] = set()
        async for output in self._engine.events(job):
            index = output.sequence.index
            if isinstance(output, Failed):
                yield event(_error(request, output).body)
                return
            reply = replies[index]
            ended = not isinstance(output, TextDelta)
            content = _read(reply, output)
            data = b""
            if envelope.chat and index not in introduced:
                introduced.add(index)
                data = envelope.role_event(index)
            if content or (ended and reply.logprobs):
                data += envelope.event(index, content, reply.logprobs, reply.offset)
                reply.logprobs = []
            if isinstance(output, Finished) and output.reason is not None:
                data += envelope.finish_event(
                    index, reply.reason(output.reason), output.sequence.text.stopped_by
                )
            if data:
                yield data
        closing = DONE
        if request.wants_usage_chunk:
            closing = envelope.usage_event(job.usage(request.choices), job.timings()) + closing
        yield closing

    async def _whole(
        self, request: GenerationRequest, job: Job, replies: list[Reply], envelope: Envelope
    ) -> Response:
        choices = [Choice(sequence.index) for sequence in job.sequences]
        async for output in self._engine.events(job):
            index = output.sequence.index
            if isinstance(output, Failed):
                raise _error(request, output)
            choices[index].add(_read(replies[index], output))
            if isinstance(output, Finished):
                choices[index].logprobs = replies[index].logprobs
                choices[index].finish_reason = replies[index].reason(output.reason or "stop")
                choices[index].stopped_by = output.sequence.text.stopped_by
        return json_response(envelope.body(choices, job.usage(request.choices), job.timings()))


def _error(request: GenerationRequest, failed: Failed) -> ApiError:
    """Whose fault it is: the form's that the client asked for, or the engine's."""
    matcher = failed.sequence.matcher
    if matcher is None or matcher.fault is None:
        return ApiError(500, failed.message, code="engine_error")
    param = request.constraint.param if request.constraint else "tools"
    return refusal(param, f"cannot be enforced to the end: {matcher.fault}")


def _service_tier(request: GenerationRequest, job: Job) -> str | None:
    """What OpenAI calls the class that the job was really in, for who asked for one."""
    if not isinstance(request, ChatCompletionRequest) or request.service_tier is None:
        return None
    return "flex" if job.priority == "batch" else "default"


def _read(reply: Reply, output: TextDelta | Finished) -> str | dict[str, Any]:
    """What an event adds to its choice; its log-probabilities wait in the reply."""
    if isinstance(output, TextDelta):
        reply.logprobs += output.logprobs
        return reply.push(output.text)
    return reply.finish(output.reason) if output.reason is not None else ""
