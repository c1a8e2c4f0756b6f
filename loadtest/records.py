"""The raw material of every figure: one record a request, one line of ``records.jsonl`` each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

_DIGITS = 6  # microseconds: finer than any clock that matters here


@dataclass(slots=True)
class RequestRecord:
    """What the client saw of one request.

    Moments are seconds since the bench began. ``started_at`` is when the request was due, ``sent_at`` when
    it went out: later only if the client had no room for it or was late itself. Token counts come from the
    server's ``usage`` alone and are None if it sent none; ``timings`` are those of rigserve's engines.
    ``chunk_gaps_seconds`` lie between chunks with text, ``chunk_tokens`` are the tokens of each chunk, None
    if they carry one each; where they do not, ``usage`` is split by the length of their texts.
    ``warmup`` marks the first requests, from which the bench learns how the server counts; ``measured`` the
    ones that began within a stage's window. ``service_tier`` is ``flex`` where the request asked for that,
    and is then priced so elsewhere. ``error`` is None for a success, otherwise its class:
    ``http_503``, ``stream_error`` (an error event), ``incomplete_stream`` (no finish reason or no
    ``[DONE]``), ``malformed_stream``, ``connection``, ``client_limit`` (this machine has no more sockets or
    files), or ``abandoned`` (by the bench, at its end).
    """

    number: int
    user: int
    warmup: bool
    started_at: float
    sent_at: float = 0.0
    ended_at: float = 0.0
    first_token_at: float | None = None
    chunk_gaps_seconds: list[float] = field(default_factory=list)
    chunk_tokens: list[float] | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    wanted_prompt_tokens: int | None = None
    finish_reason: str | None = None
    timings: dict[str, float] | None = None
    error: str | None = None
    error_message: str | None = None
    tenant: str = "default"
    service_tier: str = "default"
    turn: int = 0
    stage: int = 0
    worker: int = 0
    measured: bool = False

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token: from when the request was due to the first chunk with text."""
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def end_to_end_seconds(self) -> float:
        """From when the request was due to the end of the stream."""
        return self.ended_at - self.started_at

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.first_token_at is None or (self.completion_tokens or 0) < 2:
            return None
        assert self.completion_tokens is not None
        return sum(self.chunk_gaps_seconds) / (self.completion_tokens - 1)

    @property
    def normalized_seconds(self) -> float | None:
        """Normalized latency: end to end, per output token; None without tokens."""
        return self.end_to_end_seconds / self.completion_tokens if self.completion_tokens else None

    @property
    def queue_seconds(self) -> float:
        """Waiting before any work: in the client for a free place, and in the engine if it tells."""
        in_engine = (self.timings or {}).get("queue_seconds", 0.0)
        return max(self.sent_at - self.started_at, 0.0) + in_engine

    def as_json(self) -> dict[str, Any]:
        """Its fields, moments to the microsecond."""
        result = self.as_dict()
        for name in ("started_at", "sent_at", "ended_at", "first_token_at"):
            if result[name] is not None:
                result[name] = round(result[name], _DIGITS)
        for name in ("chunk_gaps_seconds", "chunk_tokens"):
            if result[name] is not None:
                result[name] = [round(value, _DIGITS) for value in result[name]]
        return result

    def as_dict(self) -> dict[str, Any]:
        """Its fields as they are; ``dataclasses.asdict`` would copy every gap."""
        return {name: getattr(self, name) for name in _FIELDS}


_FIELDS = tuple(one.name for one in fields(RequestRecord))


def write_records(records: Iterable[RequestRecord], path: Path) -> None:
    """One JSON object a line."""
    with path.open("wb") as file:
        for record in records:
            file.write(orjson.dumps(record.as_json()) + b"\n")


def read_records(path: Path) -> list[RequestRecord]:
    """The other end of :func:`write_records`."""
    with path.open("rb") as file:
        return [RequestRecord(**orjson.loads(line)) for line in file]
