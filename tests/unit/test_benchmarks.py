"""The benchmark's own instruments: its clock, its prompts, its tables."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web

from loadtest.benchmarks.engine.prompts import Corpus
from loadtest.benchmarks.engine.servers import require_full
from loadtest.benchmarks.engine.table import Results
from loadtest.benchmarks.streams import Reply, Stream

EVENTS = [
    {"choices": [{"text": "Grüße", "finish_reason": None}]},
    {"choices": [{"text": " an", "finish_reason": None}]},
    {"choices": [{"text": " alle", "finish_reason": "length"}]},
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 4},
        },
    },
]
STREAM = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in EVENTS)


def stream_from(pieces: list[bytes], *, pause_seconds: float = 0.0) -> Reply:
    """What the client makes of a server that writes these pieces, and then closes."""

    async def handle(request: web.Request) -> web.StreamResponse:
        assert (await request.json())["stream_options"] == {"include_usage": True}
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(pause_seconds)
        return response

    async def run() -> Reply:
        app = web.Application()
        app.router.add_post("/v1/completions", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        stream = Stream(f"http://127.0.0.1:{port}/v1/completions", {"prompt": [1]})
        try:
            async with aiohttp.ClientSession() as session:
                await stream.run(session)
        finally:
            await runner.cleanup()
        return stream.reply()

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 7, 64, len(STREAM)])
def test_a_stream_reads_the_same_however_its_bytes_arrive(size: int) -> None:
    reply = stream_from(
        [STREAM[i : i + size] for i in range(0, len(STREAM), size)] + [b"data: [DONE]\n\n"]
    )
    assert reply.text == "Grüße an alle"
    assert len(reply.chunks_at) == 3
    assert (reply.prompt_tokens, reply.completion_tokens, reply.computed_tokens) == (9, 3, 5)
    assert require_full(reply, 3) is reply


def test_the_clock_is_read_when_a_piece_of_text_comes() -> None:
    pieces = STREAM.splitlines(keepends=True)
    reply = stream_from(pieces, pause_seconds=0.05)
    assert reply.ttft_seconds > 0
    assert all(gap >= 0.05 for gap in reply.gaps_seconds)  # a line of text and an empty one: 0.1 s


def test_an_error_in_the_stream_is_not_a_short_reply() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        stream_from(
            [
                STREAM[: STREAM.index(b"\n\n") + 2],
                b'data: {"error": {"message": "out of memory"}}\n\n',
            ]
        )


def test_a_stream_that_ended_early_is_refused() -> None:
    with pytest.raises(RuntimeError, match="after 3 of 4 tokens"):
        require_full(stream_from([STREAM]), 4)


def test_no_two_prompts_of_a_round_begin_alike_and_every_server_gets_the_same() -> None:
    corpus = Corpus(list(range(300)) * 4)
    first, second = corpus.prompts(0), corpus.prompts(0)
    prompts = [first.new(20) for _ in range(100)]
    assert [second.new(20) for _ in range(100)] == prompts
    assert {len(prompt) for prompt in prompts} == {20}
    assert len({prompt[0] for prompt in prompts}) == 100
    assert corpus.prompts(1).new(20) not in prompts


def test_the_table_shows_medians_and_ours_over_theirs() -> None:
    results = Results(["ours", "theirs"])
    for ours, theirs in ((10.0, 4.0), (30.0, 5.0), (20.0, 900.0)):
        results.add("ours", {"tok/s": ours, "share, %": 1.234})
        results.add("theirs", {"tok/s": theirs})
    table = results.markdown("Speed", {"tok/s": "≥ 1.00"}, "A note.")
    assert "| tok/s | 20 | 5 | **4.00** | ≥ 1.00 |" in table
    assert "| share, % | 1.23 |  |  |  |" in table
