"""OpenTelemetry traces: a span for each request to a model, below it where the time went.

Names are those of OpenTelemetry's conventions for generative AI. The packages come with the extra ``otel``
and are imported only where tracing is on.
"""

from __future__ import annotations

import re
import threading
import time
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import __version__
from serving.config import TracingConfig
from serving.cost.ledger import UsageRecord
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest
from serving.protocol.requests import Message as ChatMessage

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

_TRACES_PATH = "/v1/traces"
_CONTEXT_HEADERS = (b"traceparent", b"tracestate")
# What is asked at each endpoint; others are not traced.
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/rerank": "rerank",
}
# Inside a JSON string the quotes would be escaped: generated text cannot look like this.
_FINISH_REASON = re.compile(rb'"finish_reason": ?"([a-z_]+)"')
# How long the end of the server waits for a collector that does not answer.
_LAST_WORDS_SECONDS = 3.0


class TracingError(Exception):
    """Traces cannot be sent; the message says what to do."""


class Trace:
    """One request's span. It ends once; what comes later is dropped."""

    def __init__(self, tracing: Tracing, span: Span, operation: str) -> None:
        self._tracing = tracing
        self._span = span
        self._operation = operation
        self._finish_reasons: list[str] = []
        self.has_ended = False

    @property
    def headers(self) -> dict[str, str]:
        """What an engine is told, so that its own spans come below this one."""
        return self._tracing.headers_of(self._span)

    def asked(self, body: ModelRequest) -> None:
        """The request has been read."""
        if not self._span.is_recording():
            return
        self._span.update_name(f"{self._operation} {body.model}")
        told: dict[str, Any] = {"gen_ai.request.model": body.model}
        if isinstance(body, ChatCompletionRequest | CompletionRequest):
            told |= {
                "gen_ai.request.max_tokens": body.token_limit,
                "gen_ai.request.temperature": body.temperature,
                "gen_ai.request.top_p": body.top_p,
                "gen_ai.request.top_k": body.top_k,
                "gen_ai.request.seed": body.seed,
                "gen_ai.request.frequency_penalty": body.frequency_penalty,
                "gen_ai.request.presence_penalty": body.presence_penalty,
                "gen_ai.request.choice.count": body.n if body.n != 1 else None,
                "gen_ai.request.stream": bool(body.stream),
            }
        if self._tracing.tells_prompts and isinstance(body, ChatCompletionRequest):
            told["gen_ai.input.messages"] = _messages_json(body.messages)
        self._tell(told)

    def saw(self, answer: bytes) -> None:
        """Whole events, or all, of what the engine answers."""
        self._finish_reasons += (each.decode() for each in _FINISH_REASON.findall(answer))

    def finished(self, record: UsageRecord, key_name: str, ttft_seconds: float | None) -> None:
        """The request has ended at an engine."""
        if self._span.is_recording():
            self._tell_of(record, key_name, ttft_seconds)
        self.answered(record.status)

    def answered(self, status: int) -> None:
        """The request has ended, with this status."""
        if not self.has_ended:
            self.has_ended = True
            self._tell({"http.response.status_code": status})
            self._tracing.end(self._span, status)

    def _tell_of(self, record: UsageRecord, key_name: str, ttft_seconds: float | None) -> None:
        self._tell(
            {
                "gen_ai.response.model": record.model,
                "gen_ai.response.finish_reasons": self._finish_reasons or None,
                "gen_ai.response.time_to_first_chunk": ttft_seconds,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "rigserve.engine": record.engine,
                "rigserve.request_id": record.request_id,
                "rigserve.key": key_name,
                "rigserve.tenant": record.tenant,
                "rigserve.cost_usd": record.usd,
                "rigserve.tokens_source": record.tokens_source,
                "rigserve.timing_source": record.timing_source,
            }
        )
        began = record.started_at
        for phase, seconds in (
            ("queue", record.queue_seconds),
            ("prefill", record.prefill_seconds),
            ("decode", record.decode_seconds),
        ):
            if seconds > 0:
                self._tracing.child(self._span, phase, began, began + seconds)
                began += seconds

    def _tell(self, told: dict[str, Any]) -> None:
        self._span.set_attributes(
            {name: value for name, value in told.items() if value is not None}
        )


class Tracing:
    """Sends spans to a collector from a thread of its own; a collector that is gone costs spans only."""

    def __init__(self, config: TracingConfig) -> None:
        """What ``config`` leaves open is as the environment variables ``OTEL_*`` say.

        Raises :class:`TracingError` where the packages are missing.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracingError(
                "tracing.enabled needs OpenTelemetry, which is not installed: "
                f"pip install 'rigserve[otel]', or set it to false ({error})"
            ) from error
        ratio = config.sample_ratio
        named = {"service.name": "rigserve", "service.version": __version__}
        given = OTELResourceDetector().detect().attributes
        self._provider = TracerProvider(
            sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
            resource=Resource.create({k: v for k, v in named.items() if k not in given}),
            shutdown_on_exit=False,
        )
        endpoint = config.endpoint and config.endpoint.rstrip("/") + _TRACES_PATH
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("rigserve")
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self.tells_prompts = config.prompts

    def begin(
        self, endpoint: str, scope: Scope | None = None, above: Trace | None = None
    ) -> Trace | None:
        """The trace of a request to an endpoint, from now on; None if there is nothing to tell of it.

        It goes on with the trace that an HTTP request's headers name, or with the one ``above``.
        """
        operation = _OPERATIONS.get(endpoint)
        if operation is None:
            return None
        told: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "rigserve",
            "url.path": endpoint,
        }
        parent: Context | None = None
        if scope is not None:
            carrier = {
                name.decode(): value.decode("latin-1")
                for name, value in scope["headers"]
                if name in _CONTEXT_HEADERS
            }
            parent = self._propagator.extract(carrier)
            if scope.get("server"):
                told["server.address"], told["server.port"] = scope["server"]
        elif above is not None:
            parent = self._trace.set_span_in_context(above._span)
        kind = self._trace.SpanKind.SERVER
        return Trace(self, self._tracer.start_span(operation, parent, kind, told), operation)

    def headers_of(self, span: Span) -> dict[str, str]:
        """W3C's headers that name a span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._trace.set_span_in_context(span))
        return carrier

    def child(self, span: Span, name: str, began_unix: float, ended_unix: float) -> None:
        """Add a part of a span's time, in seconds of Unix time."""
        context = self._trace.set_span_in_context(span)
        part = self._tracer.start_span(name, context, start_time=_nanoseconds(began_unix))
        part.end(_nanoseconds(ended_unix))

    def end(self, span: Span, status: int) -> None:
        """End a span; what failed on this side is an error, what was wrong with the request only has a type."""
        if status >= 400:
            span.set_attribute("error.type", str(status))
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(time.time_ns())

    def close(self) -> None:
        """Send what waits to be sent, for a few seconds at most."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_WORDS_SECONDS)


class TracingMiddleware:
    """Begins the traces of HTTP requests; the log entry, which has them then, ends those that reach no engine."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            scope["state"]["log_entry"].trace = self._tracing.begin(scope["path"], scope)
        await self._app(scope, receive, send)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _messages_json(messages: list[ChatMessage]) -> str:
    """A conversation as the conventions have it; of images, that there is one."""
    return orjson.dumps([{"role": m.role, "parts": _parts(m)} for m in messages]).decode()


def _parts(message: ChatMessage) -> list[dict[str, Any]]:
    if message.role == "tool":
        return [
            {"type": "tool_call_response", "id": message.tool_call_id, "response": message.text}
        ]
    parts: list[dict[str, Any]] = []
    if message.reasoning_content:
        parts.append({"type": "reasoning", "content": message.reasoning_content})
    if message.text:
        parts.append({"type": "text", "content": message.text})
    if message.has_images:
        parts.append({"type": "image"})
    return parts + [
        {
            "type": "tool_call",
            "id": c.id,
            "name": c.function.name,
            "arguments": c.function.arguments,
        }
        for c in message.tool_calls or ()
    ]
