"""A server whose latencies are known: every stream's tokens come by the clock, however many streams there are.

    python -m loadtest.benchmarks.client.clockwork PORT

It computes nothing. The finish reason comes with the last token, as vLLM's does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

import uvloop
from aiohttp import web

TTFT_SECONDS = 0.2
ITL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Truth:
    """What a client of so many users that ask for so many tokens, again and again, should find."""

    users: int
    output_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of all users, if a next request follows its answer at once."""
        seconds = TTFT_SECONDS + (self.output_tokens - 1) * ITL_SECONDS
        return self.users * self.output_tokens / seconds


async def _complete(request: web.Request) -> web.StreamResponse:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    asked = await request.json()
    tokens = asked["max_tokens"]
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for number in range(tokens):
        due = begun + TTFT_SECONDS + number * ITL_SECONDS
        await asyncio.sleep(due - loop.time())
        finish_reason = "length" if number == tokens - 1 else None
        choice = {"index": 0, "text": " token", "finish_reason": finish_reason}
        await response.write(_event({"choices": [choice]}))
    words = len(asked["prompt"].split())
    usage = {"prompt_tokens": words, "completion_tokens": tokens, "total_tokens": words + tokens}
    await response.write(_event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    return response


def _event(payload: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


async def _tokenize(request: web.Request) -> web.Response:
    return web.json_response({"count": len((await request.json())["prompt"].split())})


async def _ready(_request: web.Request) -> web.Response:
    return web.json_response({})


async def _serve(port: int) -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", _complete)
    app.router.add_post("/tokenize", _tokenize)
    app.router.add_get("/ready", _ready)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop_runner:
        loop_runner.run(_serve(int(sys.argv[1])))
