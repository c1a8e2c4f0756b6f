"""Point 8: what a JSON schema costs a token, beside free decoding."""

from __future__ import annotations

import asyncio
import statistics
from typing import Any

from loadtest.benchmarks.engine.servers import (
    LLAMA_SERVER,
    RIGSERVE,
    Rig,
    Server,
    in_turns,
    require_full,
    servers,
)
from loadtest.benchmarks.engine.table import Figures, Results

_SEQUENCES = 8
_OUTPUT_TOKENS = 128
_PASSENGER = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "cabin": {"enum": ["first", "second", "third"]},
        "luggage": {"type": "array", "items": {"type": "string", "maxLength": 20}},
    },
    "required": ["name", "age", "cabin", "luggage"],
    "additionalProperties": False,
}
# More passengers than fit into the output: no constrained stream ends early.
_PASSENGERS = {"type": "array", "minItems": 64, "items": _PASSENGER}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "passengers", "schema": _PASSENGERS}}
_WANTED = {"constrained ÷ free": "≤ 1.15"}


def measure(rig: Rig, rounds: int) -> str:
    """Compare free with constrained decoding, beside llama-server; Markdown."""
    names = [RIGSERVE, LLAMA_SERVER]
    results = Results(names)
    with servers(rig, names) as running:
        for number, server in in_turns(running, rounds):
            results.add(server.name, asyncio.run(_compare(server, number)))
    return results.markdown(
        f"Constrained decoding, {_SEQUENCES} sequences",
        _WANTED,
        f"A JSON schema of nested objects and arrays; {_OUTPUT_TOKENS} tokens a stream; time from the first token to the "
        f"last over the tokens between, median of the streams; {rounds} rounds.",
    )


async def _compare(server: Server, number: int) -> Figures:
    async with server.awake() as session:

        async def wave(**fields: Any) -> tuple[float, float]:
            """Milliseconds to the first token, and of each after it."""
            streams = [
                server.chat(
                    [{"role": "user", "content": f"{number}/{index}: list passengers as JSON."}],
                    max_tokens=_OUTPUT_TOKENS,
                    **fields,
                )
                for index in range(_SEQUENCES)
            ]
            await asyncio.gather(*(stream.run(session) for stream in streams))
            replies = [require_full(stream.reply(), _OUTPUT_TOKENS) for stream in streams]
            decode = statistics.median(sum(reply.gaps_seconds) for reply in replies)
            ttft = statistics.median(reply.ttft_seconds for reply in replies)
            return ttft * 1000, decode * 1000 / (_OUTPUT_TOKENS - 1)

        _, free = await wave(**server.endless)
        ttft, constrained = await wave(response_format=_FORMAT)
    return {
        "free, ms a token": free,
        "constrained, ms a token": constrained,
        "constrained ÷ free": constrained / free,
        "TTFT p50 constrained, ms": ttft,
    }
