"""`rigserve serve` with an engine that answers garbage, or fails, as its conversations ask for.

``python -m tests.gateway.bad_engine serve CONFIG`` is the server, with a port instead it is the engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from unittest.mock import patch

from aiohttp import web

from serving import cli
from serving.config import ModelConfig
from serving.engines.launch import Files, Launch
from serving.engines.llama_cpp import LlamaCppLauncher

# Where it stands in a body, the engine puts that header of the request.
TRACEPARENT = "TRACEPARENT"
_DONE = "data: [DONE]\n\n"
_COMPLETION = {"id": "chatcmpl-1", "created": 1, "model": "smollm2-135m"}
_FINE = json.dumps(
    {
        **_COMPLETION,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
)
_CHUNK = json.dumps(
    {
        **_COMPLETION,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": "A"}}],
    }
)
_FAILURE = json.dumps({"error": {"message": "Out of luck.", "type": "api_error"}})
# By what is said: the status, the content type and the body.
GARBAGE: dict[str, tuple[int, str, str]] = {
    "page": (200, "text/html", "<html>Welcome to nginx!</html>"),
    "list": (200, "application/json", "[]"),
    "error page": (500, "text/html", "<html>Bad gateway</html>"),
    "traceparent": (200, "application/json", f'{{"choices": [], "id": "{TRACEPARENT}"}}'),
    "nothing": (200, "application/json", ""),
    "odd usage": (200, "application/json", '{"choices": [], "usage": {"prompt_tokens": "many"}}'),
    "odd timings": (200, "application/json", '{"usage": {}, "timings": {"predicted_ms": 1}}'),
    "odd stream": (200, "text/event-stream", f'data: {{"usage":{{oops\n\n{_DONE}'),
    "odd beginning": (200, "text/event-stream", 'data: {"usage":{oops\n\n'),
    "fine": (200, "application/json", _FINE),
    "failure": (500, "application/json", _FAILURE),
}
DIES = "die once: "  # and the file by which it knows that it has
HANGS_UP = "hang up once: "  # likewise
BREAKS_OFF = "break off"
GOES_DEAF = "go deaf"
TAKES_ITS_TIME = "take your time"


class _Launcher(LlamaCppLauncher):
    def launch(
        self,
        model: ModelConfig,
        files: Files,
        port: int,
        api_key: str,
        gpus: tuple[str, ...] | None,
    ) -> Launch:
        return Launch([sys.executable, "-m", "tests.gateway.bad_engine", str(port)], {})


def _die_once(marker: Path) -> None:
    if _is_first(marker):
        os._exit(1)


def _is_first(marker: Path) -> bool:
    is_first = not marker.exists()
    marker.touch()
    return is_first


class _BadEngine:
    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port))
        self._waiting: socket.socket | None = None

    async def serve(self) -> None:
        """Answer until the process is killed."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.SockSite(runner, self._listener).start()
        await asyncio.Event().wait()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response({})
        body = json.loads(await request.read())
        said = body["messages"][0]["content"] if "messages" in body else "list"
        if said == BREAKS_OFF:
            return await self._break_off(request)
        if said == GOES_DEAF:
            self._go_deaf()
            said = "fine"
        elif said == TAKES_ITS_TIME:
            await asyncio.sleep(1.5)
            said = "fine"
        elif said.startswith(HANGS_UP):
            if _is_first(Path(said.removeprefix(HANGS_UP))):
                assert request.transport is not None
                request.transport.abort()
            said = "fine"
        elif said.startswith(DIES):
            _die_once(Path(said.removeprefix(DIES)))
            said = "fine"
        status, kind, text = GARBAGE[said]
        text = text.replace(TRACEPARENT, request.headers.get("traceparent", "-"))
        answer = web.Response(status=status, content_type=kind, text=text)
        # A connection that stays open would still be heard by an engine that has gone deaf.
        answer.force_close()
        return answer

    async def _break_off(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(f"data: {_CHUNK}\n\n".encode())
        assert request.transport is not None
        request.transport.abort()
        return stream

    def _go_deaf(self) -> None:
        """Accept no more connections; one that waits fills the queue, and the system answers no other."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.listen(0)
        self._waiting = socket.create_connection(self._listener.getsockname())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        with patch("serving.site.LlamaCppLauncher", _Launcher):
            sys.exit(cli.main(sys.argv[1:]))
    asyncio.run(_BadEngine(int(sys.argv[1])).serve())
