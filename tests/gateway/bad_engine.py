"""`rigserve serve` with an engine that answers garbage, as its conversations ask for.

``python -m tests.gateway.bad_engine serve CONFIG`` is the server, with a port instead it is the engine.
"""

from __future__ import annotations

import json
import sys
from unittest.mock import patch

from aiohttp import web

from serving import cli
from serving.config import ModelConfig
from serving.engines.launch import Files, Launch
from serving.engines.llama_cpp import LlamaCppLauncher

# Where it stands in a body, the engine puts that header of the request.
TRACEPARENT = "TRACEPARENT"
_DONE = "data: [DONE]\n\n"
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
}


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


async def _answer(request: web.Request) -> web.Response:
    if request.method == "GET":
        return web.json_response({})
    body = json.loads(await request.read())
    said = body["messages"][0]["content"] if "messages" in body else "list"
    status, kind, text = GARBAGE[said]
    text = text.replace(TRACEPARENT, request.headers.get("traceparent", "-"))
    return web.Response(status=status, content_type=kind, text=text)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        with patch("serving.serve.LlamaCppLauncher", _Launcher):
            sys.exit(cli.main(sys.argv[1:]))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", _answer)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
