"""Runs inside vLLM's API server, as ASGI middleware: what vLLM itself leaves open, and undone.

Uses the standard library only, and no ``serving`` import: vLLM's environment has no rigserve.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"

_ADAPTER_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class KeyForAll:
    """Answers 401 to requests without ``Authorization: Bearer KEY``.

    vLLM itself asks for its key below /v1 only: any process of the machine could generate at /invocations.
    """

    def __init__(self, app: _App) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Let what has the key through, and what is no request."""
        told = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(told, self._expected):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"a key is needed"})


class AdaptersLeave:
    """Has adapters that were unloaded leave vLLM's memory, before that is answered; and those that it could not load.

    vLLM itself only forgets their names, and they keep their places. Calls that load and unload must come one at a time.
    """

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Tidy up after each change of what is loaded."""
        if scope["type"] != "http" or scope["path"] not in _ADAPTER_PATHS:
            await self._app(scope, receive, send)
            return
        state = scope["app"].state

        async def after_tidying(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                served = state.openai_serving_models.lora_requests.values()
                await _tidy(state.engine_client, served)
            await send(message)

        await self._app(scope, receive, after_tidying)


async def _tidy(engine: Any, served: Collection[Any]) -> None:
    for request in served:
        # It would be read from its folder again in every step that has a request for it.
        request.load_inplace = False
    numbers = {request.lora_int_id for request in served}
    for number in set(await engine.list_loras()) - numbers:
        await engine.remove_lora(number)
