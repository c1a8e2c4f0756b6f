"""A running engine that is told which adapters to have, and what holds when it fails at one: a small server in its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from serving.config import AdapterConfig
from serving.engines.adapters import AdapterCalls, AdapterError, AdapterRefused, LiveAdapters
from serving.engines.launch import AdapterFile, AdapterRoom


def file(name: str, scale: float = 1.0) -> AdapterFile:
    return AdapterFile(Path(f"/{name}.gguf"), scale, name)


class EngineInPlace:
    """It takes any adapter but those of files named bad, and breaks off at one named broken."""

    def __init__(self) -> None:
        self.has: dict[str, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.calls: AdapterCalls | None = None

    async def load(self, http: web.Request) -> web.Response:
        body = await http.json()
        self.bodies.append(body)
        if "broken" in body["lora_path"]:
            assert http.transport is not None
            http.transport.close()
            return web.Response()
        if "bad" in body["lora_path"]:
            return web.json_response({"error": {"message": "it ends early"}}, status=400)
        self.has[body["lora_name"]] = body["lora_path"]
        return web.json_response({})

    async def unload(self, http: web.Request) -> web.Response:
        del self.has[(await http.json())["lora_name"]]
        return web.json_response({})


def run(test: Callable[[LiveAdapters, EngineInPlace], Awaitable[None]]) -> None:
    """With an engine that was launched with `a`."""

    async def main() -> None:
        engine, app = EngineInPlace(), web.Application()
        app.router.add_post("/v1/load_lora_adapter", engine.load)
        app.router.add_post("/v1/unload_lora_adapter", engine.unload)
        engine.has = {"a": "/a.gguf"}
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession() as session:
            engine.calls = AdapterCalls(session, url, "key")
            await test(LiveAdapters({"a": file("a")}, AdapterRoom(), engine.calls), engine)
        await runner.cleanup()

    asyncio.run(main())


def test_it_is_told_what_differs_only() -> None:
    async def test(live: LiveAdapters, engine: EngineInPlace) -> None:
        await live.load({"a": file("a"), "b": file("b", 0.5)})
        await live.load({"a": file("a"), "b": file("b", 0.5)})
        assert engine.bodies == [
            {"lora_name": "b", "lora_path": "/b.gguf", "load_inplace": True, "scale": 0.5}
        ]
        assert live.beside({"b": file("b")}) == ["a"]
        await live.drop("a")
        assert engine.has == {"b": "/b.gguf"}
        assert [name for name, _ in live.items()] == ["b"]

    run(test)


@pytest.mark.parametrize(("bad", "message"), [("bad", "it ends early"), ("broken", "not answer")])
def test_when_one_fails_it_has_what_it_had(bad: str, message: str) -> None:
    async def test(live: LiveAdapters, engine: EngineInPlace) -> None:
        wanted = {"a": file("a2"), "b": file("b"), "c": file(bad), "d": file("d")}
        with pytest.raises(AdapterError, match=message):
            await live.load(wanted)
        assert engine.has == {"a": "/a.gguf"}
        assert live.items() == [("a", file("a"))]

    run(test)


def test_one_that_takes_them_at_its_start_only_says_so() -> None:
    async def test(_: LiveAdapters, engine: EngineInPlace) -> None:
        fixed = LiveAdapters({"a": file("a")})
        await fixed.load({"a": file("a")})
        with pytest.raises(AdapterError, match="at its start only"):
            await fixed.load({"b": file("b")})

    run(test)


def test_versions_stay_beside_each_other_until_nobody_needs_the_old_one() -> None:
    async def test(_: LiveAdapters, engine: EngineInPlace) -> None:
        room = AdapterRoom(most=3, called=lambda name, each: f"{name}#{each.digest}")
        engine.has = {"a#a": "/a.gguf"}
        live = LiveAdapters({"a": file("a")}, room, engine.calls)
        assert live.called("a") == "a#a"
        before = time.monotonic()
        await live.load({"a": file("a2")})
        assert live.called("a") == "a#a2"
        assert engine.has == {"a#a": "/a.gguf", "a#a2": "/a2.gguf"}
        [old] = live.replaced
        assert (old.name, old.called, before <= old.at <= time.monotonic()) == ("a", "a#a", True)

        # What still waits to leave counts.
        assert live.has_room_for([AdapterConfig(name="b", path="/b")])
        await live.load({"b": file("b")})
        assert not live.has_room_for([AdapterConfig(name="c", path="/c")])
        with pytest.raises(AdapterError, match="room for 3 adapters at a time"):
            await live.load({"c": file("c")})
        assert len(engine.bodies) == 2

        # Back to the old one: it is still there, and the other waits to leave instead.
        await live.load({"a": file("a")})
        assert len(engine.bodies) == 2
        [new] = live.replaced
        await live.let_go(new)
        assert engine.has == {"a#a": "/a.gguf", "b#b": "/b.gguf"}
        await live.drop("b")
        assert engine.has == {"a#a": "/a.gguf"}
        assert live.called("b") is None

        # One that fails leaves the versions that there were.
        with pytest.raises(AdapterRefused, match="it ends early"):
            await live.load({"a": file("a3"), "b": file("bad")})
        assert live.items() == [("a", file("a"))]
        assert [each.called for each in live.replaced] == ["a#a3"]

    run(test)
