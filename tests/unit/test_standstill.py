"""An engine whose API answers while it computes nothing: told from one whose clients read slowly, and from one at work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from serving.engines.standstill import Pulse, Standstill

PATIENCE_SECONDS = 30.0


class Engine:
    """It has a pulse, and takes trials as it is told."""

    def __init__(self) -> None:
        self.steps = b"1"
        self.answers = asyncio.Event()
        self.tried = self.answered = 0

    async def pulse(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=b"other\n" + self.steps)

    async def trial(self, request: web.Request) -> web.StreamResponse:
        assert await request.json() == {"prompt": "a"}
        assert request.headers["authorization"] == "Bearer key"
        self.tried += 1
        await self.answers.wait()
        self.answered += 1
        return web.Response(status=400)


def run(test: Callable[[Engine, Standstill], Awaitable[None]]) -> None:
    async def main() -> None:
        engine, app = Engine(), web.Application()
        app.router.add_get("/pulse", engine.pulse)
        app.router.add_post("/trial", engine.trial)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        pulse = Pulse("/pulse", lambda told: told.partition(b"\n")[2], ("/trial", {"prompt": "a"}))
        try:
            async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_SECONDS):
                standstill = Standstill(pulse, session, url, "key")
                await test(engine, standstill)
                standstill.rest()
        finally:
            await runner.cleanup()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_one_that_takes_no_step_is_still_for_as_long_as_it_is_tried() -> None:
    async def test(engine: Engine, standstill: Standstill) -> None:
        assert await standstill.seconds(has_work=True) == 0
        await standstill.seconds(has_work=True)
        await until(lambda: engine.tried == 1)
        before = await standstill.seconds(has_work=True)
        assert 0 < before < await standstill.seconds(has_work=True)
        assert engine.tried == 1
        # A step, and all is well.
        engine.steps = b"2"
        assert await standstill.seconds(has_work=True) == 0

    run(test)


def test_one_whose_clients_read_slowly_answers_what_it_is_tried_with() -> None:
    async def test(engine: Engine, standstill: Standstill) -> None:
        engine.answers.set()
        for number in range(1, 4):
            await standstill.seconds(has_work=True)
            await standstill.seconds(has_work=True)
            await until(lambda: engine.answered == number)  # noqa: B023
            trying = standstill._trying
            assert trying is not None
            await trying
            assert await standstill.seconds(has_work=True) == 0

    run(test)


def test_one_without_work_or_that_does_not_tell_is_not_tried() -> None:
    async def test(engine: Engine, standstill: Standstill) -> None:
        for _ in range(3):
            assert await standstill.seconds(has_work=False) == 0
        engine.steps = b""
        for _ in range(3):
            assert await standstill.seconds(has_work=True) == 0
        assert engine.tried == 0

    run(test)
