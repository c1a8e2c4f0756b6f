"""The raw material of every figure: one record a request."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class RequestRecord:
    """What the client saw of one request.

    Moments are seconds since the bench began. Token counts come from the server's ``usage`` alone and are
    None if it sent none; ``timings`` are those of rigserve's engines. ``error`` is None for a success,
    otherwise its class: ``http_503``, ``stream_error`` (an error event), ``incomplete_stream`` (no finish
    reason or no ``[DONE]``), ``malformed_stream``, ``connection``, or ``abandoned`` (by the bench, at its end).
    """

    number: int
    user: int
    warmup: bool
    started_at: float
    ended_at: float = 0.0
    first_token_at: float | None = None
    chunk_gaps_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    timings: dict[str, float] | None = None
    error: str | None = None
    error_message: str | None = None

    @property
    def ttft_seconds(self) -> float | None:
        """Time to first token: from sending the request to the first chunk with text."""
        return None if self.first_token_at is None else self.first_token_at - self.started_at

    @property
    def end_to_end_seconds(self) -> float:
        """From sending the request to the end of the stream."""
        return self.ended_at - self.started_at

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.first_token_at is None or (self.completion_tokens or 0) < 2:
            return None
        assert self.completion_tokens is not None
        decode_seconds = sum(self.chunk_gaps_seconds)
        return decode_seconds / (self.completion_tokens - 1)
