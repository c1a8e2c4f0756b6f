"""Calls to another server: what its circuit breaker learns of them, and what is told of how they fail."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from serving.config import RemoteModel
from serving.engines.breaker import BreakerState
from serving.engines.remote import Remote
from serving.gateway.remote_call import RemoteCall, clear
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest
from serving.serve import open_session

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "Hello"}]}'
ASKED = ChatCompletionRequest.parse(BODY)
RIG_HEADERS = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
# In a row they open a breaker.
FAILURES = 5

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Line:
    """A remote, and calls to it."""

    def __init__(self, port: int, session: aiohttp.ClientSession, **options: Any) -> None:
        # An address would have no cookies anyway.
        url = f"http://localhost:{port}/v1"
        self.remote = Remote(RemoteModel(name="m", engine="remote", base_url=url, **options))
        self._session = session

    def call(self, *, streamed: bool) -> RemoteCall:
        clearance = clear(self.remote, ASKED, BODY, None)
        return RemoteCall(
            *(self._session, self.remote, ASKED, BODY, clearance.passage),
            streamed=streamed,
            rig_headers=RIG_HEADERS,
        )


@asynccontextmanager
async def line_to(handler: Handler, **options: Any) -> AsyncIterator[Line]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with open_session() as session:
            yield Line(runner.addresses[0][1], session, **options)
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("text", "header"),
    [
        (b"sk-good\n", {"authorization": "Bearer sk-good"}),
        (b"sk-old\r\nsk-new\n", {}),
        (b"\xff\xfe", {}),
        (b"", {}),
    ],
)
def test_what_cannot_be_a_key_is_not_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes, header: dict[str, str]
) -> None:
    file = tmp_path / "api.key"
    file.write_bytes(text)
    model = RemoteModel(
        name="m", engine="remote", base_url="https://api.example/v1", api_key_file=str(file)
    )
    with caplog.at_level(logging.ERROR):
        assert Remote(model).authorization == header
    assert bool(caplog.messages) == (not header and text != b"")
    assert "sk-" not in caplog.text


@pytest.mark.parametrize("streamed", [True, False])
def test_who_hangs_up_before_the_first_byte_says_nothing_against_the_server(streamed: bool) -> None:
    async def main() -> None:
        has_begun, has_left = asyncio.Event(), asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            # Its headers are there at once, the first token takes its time.
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            has_begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                has_left.set()
            return response

        async with line_to(handler) as line:
            for _ in range(FAILURES):
                has_begun.clear()
                has_left.clear()
                call = line.call(streamed=streamed)
                work = asyncio.create_task(call.open() if streamed else call.answer())
                async with asyncio.timeout(5):
                    await has_begun.wait()
                    await asyncio.sleep(0.05)  # until the headers have arrived
                    await call.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await work
                    await has_left.wait()
            assert line.remote.breaker.state is BreakerState.CLOSED

    asyncio.run(main())


def test_a_stream_is_over_when_it_says_so_although_its_connection_stays_open() -> None:
    has_left = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": []}\n\ndata: [DONE]\n\n')
        try:
            await asyncio.Event().wait()
        finally:
            has_left.set()
        return response

    async def main() -> None:
        async with line_to(handler, idle_timeout_seconds=60.0) as line, asyncio.timeout(5):
            call = line.call(streamed=True)
            told = [data async for data in call.chunks(await call.open())]
            assert b"".join(told).endswith(b"data: [DONE]\n\n")
            await has_left.wait()
            assert not any(line.remote.breaker._outcomes)

    asyncio.run(main())


@pytest.mark.parametrize("status", [200, 400])
def test_an_answer_without_end_is_broken_off(status: int) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        while True:
            await response.write(bytes(2**20))

    async def main() -> None:
        async with line_to(handler) as line, asyncio.timeout(30):
            with pytest.raises(ApiError) as refused:
                await line.call(streamed=False).answer()
            assert (refused.value.status, refused.value.code) == (503, "remote_broke_off")

    asyncio.run(main())


def test_a_stream_without_anything_in_it_has_not_begun() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        return response

    async def main() -> None:
        async with line_to(handler) as line:
            for _ in range(FAILURES):
                with pytest.raises(ApiError) as refused:
                    await line.call(streamed=True).open()
                assert (refused.value.status, refused.value.code) == (503, "remote_broke_off")
            assert line.remote.breaker.state is BreakerState.OPEN

    asyncio.run(main())


def test_a_server_learns_of_no_request_by_another() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.headers["content-type"] == "application/json"
        response = web.json_response({"cookies": dict(request.cookies)})
        response.set_cookie("who", "you")
        return response

    async def main() -> None:
        async with line_to(handler) as line:
            for _ in range(2):
                _, payload = await line.call(streamed=False).answer()
                assert json.loads(payload) == {"cookies": {}}

    asyncio.run(main())


def test_a_key_that_is_refused_is_not_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "a-key-of-no-known-form")

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=401, text=f"We know no {request.headers['authorization']}.")

    async def main() -> None:
        async with line_to(handler, api_key_env="SOME_KEY") as line:
            with pytest.raises(ApiError) as refused:
                await line.call(streamed=False).answer()
            assert (refused.value.status, refused.value.code) == (502, "remote_refused")
            assert "of-no-known-form" not in refused.value.message

    asyncio.run(main())
    assert "We know no Bearer [redacted]." in caplog.text
    assert "of-no-known-form" not in caplog.text


@pytest.mark.parametrize("dialect", ["openai", "rigserve"])
def test_only_rigs_are_told_what_is_for_rigs(dialect: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"told": request.headers.get("traceparent")})

    async def main() -> None:
        async with line_to(handler, dialect=dialect) as line:
            _, payload = await line.call(streamed=False).answer()
        told = RIG_HEADERS["traceparent"] if dialect == "rigserve" else None
        assert json.loads(payload) == {"told": told}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("status", "headers", "state"),
    [
        (429, {}, BreakerState.CLOSED),
        (503, {"retry-after": "2"}, BreakerState.CLOSED),
        (503, {}, BreakerState.OPEN),
        (500, {"retry-after": "2"}, BreakerState.OPEN),
        (400, {}, BreakerState.CLOSED),
    ],
)
def test_who_has_too_much_to_do_works(
    status: int, headers: dict[str, str], state: BreakerState
) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {}}, status=status, headers=headers)

    async def main() -> None:
        async with line_to(handler) as line:
            for _ in range(FAILURES):
                answer, _ = await line.call(streamed=False).answer()
                assert answer.status == status
            assert line.remote.breaker.state is state

    asyncio.run(main())
