"""A small server in the shape of a commercial API, which does as its conversations ask."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

KEY = "sk-commercial-0123456789abcdef"
USAGE = {"prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45}


class CommercialApi:
    """Serves on a loopback port while it is entered, and notes what it was sent.

    The last message decides: ``fail STATUS`` is an error, ``cut`` breaks a stream off, ``hang`` never answers.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                known = self.headers.get("authorization") == f"Bearer {KEY}"
                self._send(200 if known else 401, {"object": "list", "data": []})

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                body = json.loads(self.rfile.read(length))
                api.requests.append((dict(self.headers.items()), body))
                if self.headers.get("authorization") != f"Bearer {KEY}":
                    self._send(401, {"error": {"message": "no such key"}})
                    return
                said = body["messages"][-1]["content"]
                if said.startswith("fail "):
                    self._send(int(said.split()[1]), {"error": {"message": "as asked for"}})
                elif said == "hang":
                    time.sleep(5)
                elif body.get("stream"):
                    self._stream(cut=said == "cut")
                else:
                    message = {"role": "assistant", "content": "The sea."}
                    choice = {"index": 0, "message": message, "finish_reason": "stop"}
                    answer = {"id": "c", "object": "chat.completion", "created": 1, "model": "big"}
                    self._send(200, {**answer, "choices": [choice], "usage": USAGE})

            def _send(self, status: int, body: Any) -> None:
                payload = json.dumps(body, indent=1).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def _stream(self, *, cut: bool) -> None:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                top = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "big"}
                for text in ("The ", "sea."):
                    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
                    self._event({**top, "choices": [choice]})
                if not cut:
                    last = {"index": 0, "delta": {}, "finish_reason": "stop"}
                    self._event({**top, "choices": [last], "usage": USAGE})
                    self.wfile.write(b"data: [DONE]\r\n\r\n")

            def _event(self, chunk: Any) -> None:
                self.wfile.write(f"data: {json.dumps(chunk)}\r\n\r\n".encode())

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
