"""Tenant and priority reach the engine from the gateway, and from nobody else."""

from __future__ import annotations

import asyncio
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from serving.config import CostConfig, LlamaCppModel
from serving.cost.ledger import Ledger
from serving.cost.model import CostModel
from serving.cost.prices import PriceBook
from serving.engines.launch import free_port
from serving.engines.llama_cpp import LlamaCppLauncher
from serving.engines.supervisor import Endpoint, Engine
from serving.gateway.access_log import Entry
from serving.gateway.admission import Admission
from serving.gateway.caller import Caller
from serving.gateway.identity import ANYBODY
from serving.gateway.limits import Limits
from serving.gateway.metering import Meter
from serving.gateway.relay import Relay
from serving.hardware.energy import open_meter
from serving.metrics import Metrics
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest
from serving.protocol.responses import Timings, Usage
from serving.protocol.tenancy import Priority, Tenancy

HELLO = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


class Elsewhere(Engine):
    """An engine that somebody else runs."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: LlamaCppModel,
        folder: Path,
        session: aiohttp.ClientSession,
    ) -> None:
        super().__init__(model, LlamaCppLauncher(folder), session)
        self._elsewhere = endpoint

    @property
    def endpoint(self) -> Endpoint:
        return self._elsewhere


def engine_sees(folder: Path, body: dict[str, Any], client_headers: dict[str, str]) -> Any:
    """The headers with which a request arrives at an engine."""
    seen: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers)
        usage, timings = Usage(1, 0, 1).to_json(), Timings(0, 0, 0, 0, 0).to_json()
        return web.json_response({"choices": [], "usage": usage, "timings": timings})

    async def main() -> None:
        engine_app = web.Application()
        engine_app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(engine_app)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        model = LlamaCppModel(name="m", source="x.gguf")
        cost = CostConfig()
        with (
            closing(Ledger(folder / "ledger.sqlite")) as ledger,
            closing(open_meter(cost.power)) as power,
        ):
            metrics = Metrics()
            meter = Meter(ledger, metrics, CostModel(cost), PriceBook(()), power)
            async with aiohttp.ClientSession() as session:
                response = await Relay(session, meter, Limits(), Admission(metrics)).forward(
                    Caller.of(from_client(client_headers)),
                    Elsewhere(Endpoint(f"http://127.0.0.1:{port}", "key"), model, folder, session),
                    ChatCompletionRequest.parse(json.dumps(body).encode()),
                )
            assert response.status_code == 200
        await runner.cleanup()

    asyncio.run(main())
    return seen[0]


def from_client(headers: dict[str, str]) -> Request:
    async def stays_connected() -> Any:
        await asyncio.Event().wait()

    return Request(
        {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "state": {"request_id": "r", "identity": ANYBODY, "log_entry": Entry()},
            "server": ("gateway", 80),
            "scheme": "http",
        },
        stays_connected,
    )


def test_the_gateway_names_user_and_priority(tmp_path: Path) -> None:
    headers = engine_sees(tmp_path, HELLO | {"user": "Zoë\r\nx: y", "service_tier": "flex"}, {})
    assert Tenancy.from_headers(headers) == Tenancy("Zoë\r\nx: y", 1.0, "batch")


def test_a_client_cannot(tmp_path: Path) -> None:
    forged = Tenancy("the boss", 99.0, "batch").to_headers()
    assert Tenancy.from_headers(engine_sees(tmp_path, HELLO, forged)) == Tenancy()


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.floats(min_value=1e-9, max_value=1e9),
    st.sampled_from(["interactive", "batch"]),
)
def test_headers_carry_any_name(tenant: str, weight: float, priority: Priority) -> None:
    tenancy = Tenancy(tenant, weight, priority)
    headers = tenancy.to_headers()
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert Tenancy.from_headers(headers) == tenancy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-rigserve-weight", "0"),
        ("x-rigserve-weight", "-1"),
        ("x-rigserve-weight", "nan"),
        ("x-rigserve-weight", "inf"),
        ("x-rigserve-weight", "much"),
        ("x-rigserve-priority", "urgent"),
    ],
)
def test_a_header_that_makes_no_sense_is_named(name: str, value: str) -> None:
    with pytest.raises(ApiError) as refusal:
        Tenancy.from_headers({name: value})
    assert refusal.value.status == 400
    assert name in refusal.value.message


@pytest.mark.parametrize(
    ("tier", "priority"),
    [(None, "interactive"), ("auto", "interactive"), ("default", "interactive"), ("flex", "batch")],
)
def test_the_service_tier_says_how_urgent_a_chat_is(tier: str | None, priority: Priority) -> None:
    assert (
        ChatCompletionRequest.parse(json.dumps(HELLO | {"service_tier": tier}).encode()).priority
        == priority
    )


@pytest.mark.parametrize("tier", ["priority", "scale", "fast", 1])
def test_other_tiers_are_refused(tier: object) -> None:
    with pytest.raises(ApiError) as refusal:
        ChatCompletionRequest.parse(json.dumps(HELLO | {"service_tier": tier}).encode())
    assert (refusal.value.status, refusal.value.param) == (400, "service_tier")


def test_text_completions_have_no_tier() -> None:
    assert CompletionRequest.parse(b'{"model":"m","prompt":"x"}').priority == "interactive"
