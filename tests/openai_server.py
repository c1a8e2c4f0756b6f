"""A small server in OpenAI's shape that can be told how to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

JOULES_A_REQUEST = 2.0
WARM_UP_WORDS = (11, 61)  # those of a bench's first requests


class OpenAIServer(BaseHTTPRequestHandler):
    """A small server in OpenAI's shape; ``behaviour`` chooses how it misbehaves."""

    behaviour = "good"
    usages: list[dict[str, int]]  # one for each answer it has finished
    begun: list[str]  # the prompts of the load, without those of the warm-up
    bodies: list[dict[str, Any]]  # of all requests
    present: list[OpenAIServer]
    protocol_version = "HTTP/1.1"
    timeout = 0.5  # then it hangs up on an idle connection

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": "tiny"}]}).encode())
        elif self.path == "/metrics" and self.behaviour == "metered":
            joules = JOULES_A_REQUEST * len(self.usages)
            metrics = (
                f'rigserve_energy_joules_total{{model="tiny",source="nvml"}} {joules}\n'
                f'rigserve_requests_total{{model="tiny",status="200"}} {float(len(self.usages) + 7)}\n'
            )
            self.answer(200, metrics.encode())
        else:
            self.answer(404, b"no such thing")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self.tokenize(body)
            return
        self.bodies.append(body)
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        words = len(prompt.split())
        warm_up = words in WARM_UP_WORDS
        behaviour = "good" if warm_up and self.behaviour != "strict" else self.behaviour
        if not warm_up:
            self.begun.append(prompt)
        if behaviour == "strict" and "ignore_eos" in body:
            self.answer(400, b'{"error": {"message": "Extra inputs are not permitted"}}')
            return
        if behaviour == "busy":
            self.answer(503, b'{"error": {"message": "all slots [/of 8] are taken"}}')
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        self.send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        if behaviour == "in pairs":
            self.send({"choices": [{"delta": {"content": "ab"}}]})
            time.sleep(0.1)
            self.send({"choices": [{"delta": {"content": "cd"}}]})
            self.finish_with({"prompt_tokens": words + 5, "completion_tokens": 4})
            return
        if behaviour == "crowded":  # beyond four at once, more of them get less done
            self.present.append(self)
            time.sleep(0.1 * max(len(self.present) / 4, 1) ** 1.5)
            self.present.pop()
        for letter in "abcd"[: body["max_tokens"]]:
            if behaviour == "slow":
                time.sleep(0.4)
            if behaviour == "paced":
                time.sleep(0.02)
            delta: dict[str, Any] = {"content": letter}
            if behaviour == "thinks and calls":
                call = {"index": 0, "function": {"arguments": letter}}
                delta = {"reasoning_content": letter} if letter < "c" else {"tool_calls": [call]}
            self.send({"choices": [{"delta": delta}], "error": None})
        if behaviour in MISSHAPEN:
            self.wfile.write(b"data: " + MISSHAPEN[behaviour][0] + b"\n\n")
            return
        if behaviour == "no end":
            self.send({"choices": [{"delta": None, "finish_reason": "length"}]})
            return
        each = 2 if self.behaviour == "counts" else 1
        usage = {"prompt_tokens": each * words + 5, "completion_tokens": min(body["max_tokens"], 4)}
        self.finish_with(usage)

    def finish_with(self, usage: dict[str, int]) -> None:
        """The end of a good stream."""
        self.send({"choices": [{"delta": None, "finish_reason": "length"}]})
        self.usages.append(usage)
        if self.behaviour != "no usage":
            self.send({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def tokenize(self, body: dict[str, Any]) -> None:
        """Two tokens a word, where there is such a route."""
        if self.behaviour == "counts":
            self.answer(200, json.dumps({"count": 2 * len(body["prompt"].split())}).encode())
        else:
            self.answer(404, b"no such thing")

    def send(self, event: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        pass


MISSHAPEN = {  # what is sent instead of the end: (data, class, part of the message)
    "dies": (b'{"error": {"message": "engine died"}}', "stream_error", "engine died"),
    "says no more": (b'{"error": "out of memory"}', "stream_error", "out of memory"),
    "no JSON": (b"{oops", "malformed_stream", "shape"),
    "a list": (b"[1]", "malformed_stream", "shape"),
    "no [DONE]": (b'{"choices": []}', "incomplete_stream", "broke off"),
}


class QuietServer(ThreadingHTTPServer):
    """Clients that hang up are part of the tests."""

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def serving(behaviour: str) -> Iterator[tuple[str, type[OpenAIServer]]]:
    """A running server: its base URL, and where it counts."""
    handler = type(
        "Handler",
        (OpenAIServer,),
        {
            "behaviour": behaviour,
            "usages": [],
            "begun": [],
            "bodies": [],
            "present": [],
        },
    )
    with QuietServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
        server.shutdown()
