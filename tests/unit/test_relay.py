"""The relay and the dispatcher, with servers that do as they are told: every way out gives all places back."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from starlette.requests import Request as HttpRequest

from serving.config import CostConfig, LlamaCppModel, RemoteModel, RouteConfig, ServerConfig
from serving.cost.ledger import Ledger
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook
from serving.engines.llama_cpp import LlamaCppLauncher
from serving.engines.remote import Remote
from serving.engines.supervisor import Endpoint, Engine, EngineState
from serving.gateway import batch_runner
from serving.gateway.access import Access
from serving.gateway.access_log import Entry
from serving.gateway.admission import Admission
from serving.gateway.background import BackgroundResponses
from serving.gateway.balancing import Balancer, Marks
from serving.gateway.batch_runner import BatchRunner
from serving.gateway.batch_store import BatchStore
from serving.gateway.body_room import BodyRoom, Share
from serving.gateway.caller import (
    DEADLINE_HEADER,
    HOPS_HEADER,
    MAX_HOPS,
    SPILL_OVER_HEADER,
    Caller,
)
from serving.gateway.dispatch import Dispatcher, Plan
from serving.gateway.file_store import FileStore
from serving.gateway.identity import ANYBODY, Identity
from serving.gateway.intake import Gateway
from serving.gateway.limits import Limits
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.gateway.response_store import ResponseStore
from serving.gateway.routing import Candidate, Role, Route, Router
from serving.hardware.energy import open_meter
from serving.keys.key import Allowance
from serving.keys.ring import KeyRing
from serving.keys.store import KeyStore
from serving.metrics import Metrics
from serving.protocol.anthropic import MessageTranslation
from serving.protocol.batches import BatchRequest, Line, begun
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.errors import UNSUPPORTED_PARAMETER, ApiError
from serving.protocol.requests import ChatCompletionRequest, ModelRequest
from serving.protocol.sse import ClientDisconnected

PATIENCE_SECONDS = 10.0
PER_MINUTE = 10
IDENTITY = Identity(
    key_id="k", allowance=Allowance(max_concurrent=1, requests_per_minute=PER_MINUTE)
)
CALLER = Caller("r", "/v1/chat/completions", IDENTITY)
COUNTED = TokenizeRequest.parse(b'{"model": "m", "prompt": "The sea"}')

JSON = "application/json"
COMPLETION = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "A."}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.of(
        {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **fields}
    )


class House:
    """A relay with all that it works with, and remotes that handlers answer for."""

    def __init__(self, session: aiohttp.ClientSession, ledger: Ledger, meter: Meter) -> None:
        self.ledger = ledger
        self.limits = Limits()
        self.admission = Admission(meter._metrics)
        self.relay = Relay(session, meter, self.limits, self.admission)
        self.dispatcher = Dispatcher(self.relay, meter, Balancer(self.admission))
        self.runners: list[web.AppRunner] = []

    async def remote(self, name: str, handler: Handler | None) -> Remote:
        """A remote; without a handler one that nobody is at."""
        app = web.Application()
        app.router.add_post("/{path:.*}", handler or answers(200))
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        if handler is None:
            await runner.cleanup()
        else:
            self.runners.append(runner)
        return Remote(
            RemoteModel(name=name, engine="remote", base_url=url, dialect="rigserve", model="m")
        )

    @contextmanager
    def gateway(
        self, folder: Path, *remotes: Remote, routes: Sequence[RouteConfig] = (), **stores: Any
    ) -> Iterator[Gateway]:
        """All of the gateway but its HTTP."""
        with (
            closing(KeyRing(folder)) as ring,
            closing(KeyStore(folder)) as keys,
            closing(ResponseStore(folder / "responses.sqlite")) as responses,
            closing(FileStore(folder)) as files,
            closing(stores.get("batches") or BatchStore(folder)) as batches,
        ):
            metrics = self.admission.metrics
            yield Gateway(
                access=Access(
                    ring, self.limits, metrics, require_keys=False, metrics_access="open"
                ),
                keys=keys,
                router=Router((), remotes, routes),
                relay=self.relay,
                dispatcher=self.dispatcher,
                meter=self.relay._meter,
                metrics=metrics,
                session=self.relay._session,
                max_body_bytes=10_000,
                body_timeout_seconds=PATIENCE_SECONDS,
                body_room=BodyRoom(0, PATIENCE_SECONDS),
                responses=BackgroundResponses(responses, self.dispatcher),
                files=files,
                batches=batches,
            )

    def plan(
        self, *remotes: Remote, prepare: Callable[[Candidate], ModelRequest] | None = None
    ) -> Plan:
        candidates = [Candidate(each.model.name, each, Role.TARGET) for each in remotes]
        route = Route("r", tuple(candidates), None)
        return Plan(route, candidates, Marks(), prepare or (lambda _: COUNTED))

    def statuses(self) -> list[int]:
        """Those of the ledger's rows."""
        self.ledger.flush()
        with closing(sqlite3.connect(self.ledger._path)) as connection:
            return [status for (status,) in connection.execute("SELECT status FROM usage")]

    async def is_as_before(self, *remotes: Remote) -> bool:
        """Whether nothing is held any more for a request; waits for what settles."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.relay.settled()
        self.limits.reserve(IDENTITY, 1)  # raises if the one before is under way
        held = [self.admission.in_flight(remote) for remote in remotes]
        return not any(held) and self.relay.open_requests == 0


@asynccontextmanager
async def a_house(folder: Path) -> AsyncIterator[House]:
    cost = CostConfig()
    with (
        closing(Ledger(folder / "ledger.sqlite")) as ledger,
        closing(open_meter(cost.power)) as power,
    ):
        meter = Meter(ledger, Metrics(), CostModel(cost), PriceBook(()), power)
        async with aiohttp.ClientSession() as session:
            house = House(session, ledger, meter)
            try:
                yield house
            finally:
                for runner in house.runners:
                    await runner.cleanup()


def answers(status: int, body: Any = None, headers: dict[str, str] | None = None) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response(body or {"error": {}}, status=status, headers=headers)

    return handler


@pytest.mark.parametrize(
    ("streamed", "status"), [(False, None), (True, None), (True, 400), (False, 200)]
)
def test_a_request_that_is_cancelled_is_metered_and_gives_its_places_back(
    tmp_path: Path, streamed: bool, status: int | None
) -> None:
    async def main() -> None:
        has_begun = asyncio.Event()

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(status=status or 200)
            if status is not None:
                await response.prepare(request)
                await response.write(b"{")
            has_begun.set()
            await asyncio.Event().wait()
            return response

        async with a_house(tmp_path) as house:
            remote = await house.remote("a", handler)
            work = asyncio.create_task(house.relay.forward(CALLER, remote, chat(stream=streamed)))
            async with asyncio.timeout(PATIENCE_SECONDS):
                await has_begun.wait()
            await asyncio.sleep(0.05)  # until what it has said is there
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            assert await house.is_as_before(remote)
            assert house.statuses() == [499]

    asyncio.run(main())


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_question_is_passed_on_as_a_request_is_and_counts_once(
    tmp_path: Path, status: int
) -> None:
    async def main() -> None:
        async with a_house(tmp_path) as house:
            busy = await house.remote("busy", answers(status))
            other = await house.remote("other", answers(200, {"count": 2, "tokens": [1, 2]}))
            answer = await house.dispatcher.ask(CALLER, house.plan(busy, other), COUNTED)
            assert answer.status_code == 200
            assert answer.headers["x-rigserve-model"] == "other"
            requests, _ = house.limits.states(IDENTITY)
            assert requests is not None
            assert requests.remaining == PER_MINUTE - 1
            assert await house.is_as_before(busy, other)

    asyncio.run(main())


def test_an_adapter_that_has_gone_since_it_was_found_is_not_answered_by_its_base(
    tmp_path: Path,
) -> None:
    """It may go while a route's request tries others first."""

    async def main() -> None:
        async with a_house(tmp_path) as house, aiohttp.ClientSession() as session:
            model = LlamaCppModel(name="base", source="-", aliases=("nick",), load="on_demand")
            engine = Engine(model, LlamaCppLauncher(tmp_path), session)
            with pytest.raises(ApiError) as refused:
                await house.relay.forward(CALLER, engine, chat(model="gone"))
            assert (refused.value.status, refused.value.code) == (503, "model_not_ready")
            other = await house.remote("other", answers(200, COMPLETION))
            first = Candidate("gone", engine, Role.TARGET)
            second = Candidate("other", other, Role.FALLBACK)
            plan = Plan(
                *(Route("r", (first, second), None), [first, second], Marks()),
                lambda each: chat(model=each.name),
            )
            answer = await house.dispatcher.forward(CALLER, plan, chat(model="gone"))
            assert answer.headers["x-rigserve-model"] == "other"
            assert await house.is_as_before(other)

    asyncio.run(main())


@pytest.mark.parametrize("code", [UNSUPPORTED_PARAMETER, "invalid_value"])
def test_who_cannot_serve_it_does_not_make_it_the_clients_fault_that_the_others_are_down(
    tmp_path: Path, code: str
) -> None:
    def prepare(_: Candidate) -> ModelRequest:
        raise ApiError(400, "'top_k' is not supported.", code=code)

    async def main() -> None:
        async with a_house(tmp_path) as house:
            down, narrow = await house.remote("down", None), await house.remote("n", answers(200))
            plan = house.plan(down, narrow, prepare=prepare)
            with pytest.raises(ApiError) as refused:
                await house.dispatcher.forward(CALLER, plan, chat(top_k=3))
            assert (refused.value.status, refused.value.code) == (503, "remote_unreachable")
            assert refused.value.retry_after_seconds
            assert "'top_k' is not supported." in refused.value.message
            assert await house.is_as_before(down, narrow)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("7", 7), ("²", None), ("9" * 5000, None), ("Wed, 21 Oct 2026 07:28:00 GMT", None)],
)
def test_a_retry_after_may_be_anything(tmp_path: Path, told: str, seconds: int | None) -> None:
    async def main() -> None:
        async with a_house(tmp_path) as house:
            busy = await house.remote("busy", answers(429, headers={"retry-after": told}))
            with pytest.raises(ApiError) as refused:
                await house.dispatcher.forward(CALLER, house.plan(busy), chat())
            assert (refused.value.status, refused.value.retry_after_seconds) == (429, seconds)
            assert await house.is_as_before(busy)

    asyncio.run(main())


def test_a_reload_between_two_tries_does_not_break_the_second(tmp_path: Path) -> None:
    async def main() -> None:
        async with a_house(tmp_path) as house:
            other = await house.remote("other", answers(200, COMPLETION))
            is_asked, may_answer = asyncio.Event(), asyncio.Event()

            async def busy(_: web.Request) -> web.StreamResponse:
                is_asked.set()
                await may_answer.wait()
                return web.json_response({"error": {}}, status=503)

            first = await house.remote("first", busy)
            route = RouteConfig.model_validate(
                {"name": "m", "targets": [{"model": "first"}], "fallback": ["other"]}
            )
            with house.gateway(tmp_path, first, other, routes=[route]) as gateway:
                fields = chat().model_dump(exclude_none=True)
                destination, asked, _ = gateway.admit(
                    ChatCompletionRequest.path, IDENTITY, fields, ChatCompletionRequest.of
                )
                work = asyncio.create_task(house.dispatcher.forward(CALLER, destination, asked))
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await is_asked.wait()
                    gateway.configure(Router((), [first]), ServerConfig())
                    may_answer.set()
                    assert (await work).status_code == 200
            assert await house.is_as_before(first, other)

    asyncio.run(main())


class FullDisk(BatchStore):
    """It cannot be read the second time."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.reads = 0
        self.has_failed, self.has_ended = asyncio.Event(), asyncio.Event()

    async def pending(self, batch_id: str, after: int, limit: int) -> list[Line]:
        self.reads += 1
        if self.reads == 2:
            self.has_failed.set()
            raise ApiError(507, "No space left on device.")
        return await super().pending(batch_id, after, limit)

    async def end(self, batch_id: str, source: str, status: str, **more: Any) -> bool:
        was_ended = await super().end(batch_id, source, status, **more)
        self.has_ended.set()
        return was_ended


def test_a_full_disk_does_not_break_off_the_lines_that_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "_STORAGE_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(batch_runner, "_LONGEST_RETRY_SECONDS", 0.1)
    asked = 0

    async def main() -> None:
        async with a_house(tmp_path) as house:
            store = FullDisk(tmp_path)

            async def handler(_: web.Request) -> web.StreamResponse:
                nonlocal asked
                asked += 1
                await store.has_failed.wait()
                await asyncio.sleep(0.1)
                return web.json_response(COMPLETION)

            remote = await house.remote("m", handler)
            with house.gateway(tmp_path, remote, batches=store) as gateway:
                path = ChatCompletionRequest.path
                request = BatchRequest(
                    input_file_id="file-1", endpoint=path, completion_window="24h"
                )
                await store.add(begun("batch_1", request, int(time.time())), None)
                body = chat().model_dump_json(exclude_none=True).encode()
                lines = [Line(1, "a", body), Line(2, "b", body)]
                await store.start("batch_1", lines, "m")
                runner = BatchRunner(gateway)
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await store.has_ended.wait()
                runner.stop()
                await runner.stopped()
                batch = await store.get("batch_1")
            assert batch is not None
            assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
            assert asked == 2
            assert house.statuses() == [200, 200]

    asyncio.run(main())


@pytest.mark.parametrize("word", ["no", "Never", ""])
def test_a_word_against_spilling_over_is_never_misunderstood(tmp_path: Path, word: str) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"model": "m"}', "more_body": False}

    def said(word: str) -> HttpRequest:
        headers = [(SPILL_OVER_HEADER.encode(), word.encode())]
        path = ChatCompletionRequest.path
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        rest = {"query_string": b"", "server": ("rig", 80), "state": {"body_share": Share()}}
        return HttpRequest({**scope, **rest}, receive)

    async def main() -> None:
        async with a_house(tmp_path) as house:
            with house.gateway(tmp_path, await house.remote("m", None)) as gateway:
                assert await gateway.fields_of(said("never")) == {"model": "m"}
                with pytest.raises(ApiError, match="can be 'never' only") as refused:
                    await gateway.fields_of(said(word))
                assert (refused.value.status, refused.value.param) == (400, SPILL_OVER_HEADER)

    asyncio.run(main())


def test_a_remote_stream_that_breaks_off_is_not_said_to_be_started_again(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"index": 0, "delta": {"content": "The"}}]}\n\n')
        return response

    async def main() -> None:
        sent = bytearray()

        async def send(message: Any) -> None:
            sent.extend(message.get("body", b""))

        async with a_house(tmp_path) as house:
            remote = await house.remote("m", handler)
            response = await house.relay.forward(CALLER, remote, chat(stream=True))
            await response({"type": "http"}, CALLER.receive, send)
            *_, last = bytes(sent).strip().split(b"\n\n")
            assert b'"code":"remote_broke_off"' in last
            assert await house.is_as_before(remote)
            assert house.statuses() == [500]

    asyncio.run(main())


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"error": "too long"}, 400),
        (400, {"error": [1]}, 502),
        (400, {"error": None}, 502),
        (400, {"detail": "too long"}, 502),
        (200, {"choices": [1], "usage": {}}, 502),
        (200, {"choices": {"a": 1}}, 502),
    ],
)
def test_what_cannot_be_translated_is_a_bad_gateway_and_is_metered_once(
    tmp_path: Path, status: int, body: Any, told: int, streamed: bool
) -> None:
    async def main() -> None:
        async with a_house(tmp_path) as house:
            remote = await house.remote("m", answers(status, body))
            translation = MessageTranslation(chat(), "r")
            try:
                asked = chat(stream=streamed)
                answer = await house.relay.forward(CALLER, remote, asked, translation)
            except ApiError as error:
                answer = error.response
            assert answer.status_code == told
            assert told == 502 or b"too long" in bytes(answer.body)
            assert await house.is_as_before(remote)
            assert house.statuses() == [told]

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("by_route", [False, True])
@pytest.mark.parametrize("outcome", [200, 503, 499, None])
def test_what_an_engine_was_not_sent_waits_until_it_is_back(
    tmp_path: Path, outcome: int | None, by_route: bool
) -> None:
    """Its process has ended, which nobody has noticed yet: nobody listens there. None: nor when it is back."""

    async def main() -> None:
        async with a_house(tmp_path) as house, aiohttp.ClientSession() as session:
            model = LlamaCppModel(name="m", source="-", load="on_demand")
            engine = Engine(model, LlamaCppLauncher(tmp_path), session)
            engine.on_change(house.admission.changed)
            gone = await house.remote("gone", None)
            there = await house.remote("m", answers(200, COMPLETION))
            engine._endpoint = Endpoint(gone.model.base_url.removesuffix("/v1"), "k")
            engine._move(EngineState.READY)
            leaves = asyncio.Event()

            async def receive() -> Any:
                await leaves.wait()
                return {"type": "http.disconnect"}

            caller = replace(CALLER, receive=receive, log_entry=Entry())
            down = Candidate("gone", gone, Role.TARGET)
            last = Candidate("m", engine, Role.FALLBACK)
            plan = Plan(
                *(Route("r", (down, last), None), [down, last], Marks()),
                lambda each: chat(model=each.name),
            )
            destination = plan if by_route else engine
            work = asyncio.create_task(house.dispatcher.forward(caller, destination, chat()))
            # It keeps its place until it is known that the engine is away, and then waits for it.
            async with asyncio.timeout(PATIENCE_SECONDS):
                await until(lambda: house.admission.in_flight(engine) == 1)
                await asyncio.sleep(0.1)
                assert house.admission.in_flight(engine) == 1
                engine._move(EngineState.BACKOFF)
                await until(lambda: house.admission.waiting(engine) == 1)
                assert house.admission.in_flight(engine) == 0
                if outcome == 200:
                    engine._endpoint = Endpoint(there.model.base_url.removesuffix("/v1"), "k")
                    engine._move(EngineState.READY)
                    assert (await work).status_code == 200
                elif outcome is None:
                    engine._move(EngineState.READY)
                    with pytest.raises(ApiError):
                        await work
                elif outcome == 499:
                    leaves.set()
                    with pytest.raises(ClientDisconnected):
                        await work
                else:
                    engine._move(EngineState.STOPPED)
                    with pytest.raises(ApiError) as refused:
                        await work
                    assert (refused.value.status, refused.value.code) == (503, "engine_stopped")
            assert await house.is_as_before()
            assert house.admission.waiting(engine) == house.admission.in_flight(engine) == 0
            # What a route has handed on to nobody is in the log only, of all requests exactly once.
            metered = [] if outcome is None and by_route else [outcome or 503]
            assert house.statuses() == metered
            assert caller.log_entry.is_metered == bool(metered)

    asyncio.run(main())


def test_rigs_that_lead_to_each_other_do_not_send_a_request_round_for_ever(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        asked = 0
        async with a_house(tmp_path) as house:

            async def handler(request: web.Request) -> web.StreamResponse:
                nonlocal asked
                asked += 1
                caller = replace(CALLER, hops=int(request.headers[HOPS_HEADER]), identity=ANYBODY)
                try:
                    plan = house.plan(remote)
                    answer = await house.dispatcher.forward(caller, plan, chat())
                except ApiError as error:
                    answer = error.response
                return web.Response(
                    body=bytes(answer.body), status=answer.status_code, content_type=JSON
                )

            remote = await house.remote("m", handler)
            with pytest.raises(ApiError, match="lead in a circle") as refused:
                await house.dispatcher.forward(CALLER, house.plan(remote), chat())
            assert refused.value.status == 503
            assert asked == MAX_HOPS
            assert await house.is_as_before(remote)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "asked", "headers", "tier"),
    [
        ({}, {}, {}, None),
        ({"may_spill": False}, {}, {SPILL_OVER_HEADER: "never"}, None),
        (
            {"identity": replace(IDENTITY, models=("m",))},
            {},
            {SPILL_OVER_HEADER: "never"},
            None,
        ),
        ({"deadline": "2.5"}, {}, {DEADLINE_HEADER: "2.500"}, None),
        ({}, {"service_tier": "flex"}, {SPILL_OVER_HEADER: "never"}, "flex"),
        (
            {"identity": replace(IDENTITY, priority="batch")},
            {},
            {SPILL_OVER_HEADER: "never"},
            "flex",
        ),
    ],
)
def test_what_was_said_of_a_request_holds_at_the_next_rig_too(
    tmp_path: Path,
    fields: dict[str, Any],
    asked: dict[str, Any],
    headers: dict[str, str],
    tier: str | None,
) -> None:
    async def main() -> None:
        told: dict[str, str | None] = {}
        tiers: list[str | None] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            names = (SPILL_OVER_HEADER, DEADLINE_HEADER)
            told.update({name: request.headers.get(name) for name in names})
            tiers.append((await request.json()).get("service_tier"))
            return web.json_response(COMPLETION)

        async with a_house(tmp_path) as house:
            remote = await house.remote("m", handler)
            answer = await house.relay.forward(replace(CALLER, **fields), remote, chat(**asked))
            assert answer.status_code == 200
            assert {name: word for name, word in told.items() if word is not None} == headers
            assert tiers == [tier]

    asyncio.run(main())


def test_a_rig_has_no_longer_for_its_start_than_the_route_gives_it(tmp_path: Path) -> None:
    async def main() -> None:
        told: list[str | None] = []

        async def handler(request: web.Request) -> web.StreamResponse:
            told.append(request.headers.get(DEADLINE_HEADER))
            return web.json_response({"error": {}}, status=503)

        async with a_house(tmp_path) as house:
            first, last = await house.remote("first", handler), await house.remote("last", handler)
            plan = house.plan(first, last, prepare=lambda _: chat())
            plan.route = replace(plan.route, max_wait_seconds=5.0)
            with pytest.raises(ApiError):
                await house.dispatcher.forward(CALLER, plan, chat())
            # After the last there is nobody to try: it may take its time.
            assert told == ["5.000", None]

    asyncio.run(main())
