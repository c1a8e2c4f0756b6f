"""Point 8: what a JSON schema costs a token, beside free decoding."""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    RIGSERVE,
    Rig,
    Server,
    require_full,
    rotated,
    servers,
)
from loadtest.benchmarks.engine.table import milliseconds, ratio, section

_NAMES = (RIGSERVE, LLAMA_SERVER)
_SEQUENCES = 8
_OUTPUT_TOKENS = 128
# More passengers than fit into the output: no constrained stream ends early.
_SCHEMA = {
    "type": "object",
    "properties": {
        "ship": {"type": "string"},
        "passengers": {
            "type": "array",
            "minItems": 64,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 40},
                    "age": {"type": "integer"},
                    "cabin": {"enum": ["first", "second", "third"]},
                    "luggage": {"type": "array", "items": {"type": "string", "maxLength": 20}},
                },
                "required": ["name", "age", "cabin", "luggage"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["ship", "passengers"],
    "additionalProperties": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "voyage", "schema": _SCHEMA}}


@dataclass(frozen=True, slots=True)
class Wave:
    """Streams started at once: the median of their times."""

    ttft_seconds: float
    token_seconds: float


def measure(rig: Rig, rounds: int) -> str:
    """Compare free with constrained decoding, beside llama-server; Markdown."""
    waves: dict[tuple[str, bool], list[Wave]] = defaultdict(list)
    with servers(rig, _NAMES) as running:
        for number in range(rounds):
            for server in rotated(running, number):
                for constrained in rotated([False, True], number):
                    wave = asyncio.run(_wave(server, number, constrained=constrained))
                    waves[server.name, constrained].append(wave)
    return section(
        f"Constrained decoding, {_SEQUENCES} sequences",
        ["server", "free, a token", "constrained", "ratio", "wanted", "TTFT free", "TTFT constrained"],
        [_row(name, waves[name, False], waves[name, True]) for name in _NAMES],
        f"A JSON schema of nested objects and arrays; {_OUTPUT_TOKENS} tokens a stream; time from the first token to the last "
        f"over the tokens between, median of the streams; {rounds} rounds.",
    )  # fmt: skip


async def _wave(server: Server, number: int, *, constrained: bool) -> Wave:
    fields: dict[str, Any] = {"response_format": _FORMAT} if constrained else server.endless
    streams = [
        server.chat(
            [{"role": "user", "content": f"{number}/{index}: list the passengers as JSON."}],
            max_tokens=_OUTPUT_TOKENS,
            **fields,
        )
        for index in range(_SEQUENCES)
    ]
    async with server.awake() as session:
        await asyncio.gather(*(stream.run(session) for stream in streams))
    replies = [require_full(stream.reply(), _OUTPUT_TOKENS) for stream in streams]
    return Wave(
        statistics.median(reply.ttft_seconds for reply in replies),
        statistics.median(
            (reply.chunks_at[-1] - reply.chunks_at[0]) / (_OUTPUT_TOKENS - 1) for reply in replies
        ),
    )


def _row(name: str, free: Sequence[Wave], constrained: Sequence[Wave]) -> list[str]:
    free_token, constrained_token = (
        statistics.median(wave.token_seconds for wave in waves) for waves in (free, constrained)
    )
    return [
        name,
        milliseconds(free_token),
        milliseconds(constrained_token),
        ratio(constrained_token, free_token),
        "≤ 1.15" if name == RIGSERVE else "",
        *(
            milliseconds(statistics.median(wave.ttft_seconds for wave in waves))
            for waves in (free, constrained)
        ),
    ]
