"""Streams of other servers, however they write them, come out as the gateway reads them."""

from __future__ import annotations

import json

import pytest

from serving.gateway.remote_stream import CanonicalEvents
from serving.gateway.stream import StreamTap
from serving.protocol.sse import DONE

CHUNKS = [
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"index": 0, "delta": {"content": "The "}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {"content": "sea\u2028"}}]},
]
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE = {"prompt_tokens": 7, "completion_tokens": 2}

SEPARATE = [*CHUNKS, LAST, {"choices": [], "usage": USAGE}]
TOGETHER = [*CHUNKS, {**LAST, "usage": USAGE}]


@pytest.mark.parametrize("chunks", [SEPARATE, TOGETHER])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_all_ways_to_write_a_stream(
    chunks: list[dict[str, object]], line_end: str, separators: tuple[str, str], step: int
) -> None:
    lines = [f": ping{line_end}{line_end}"]
    for chunk in chunks:
        written = json.dumps(chunk, separators=separators, ensure_ascii=False)
        lines.append(f"event: message{line_end}data: {written}{line_end}{line_end}")
    lines.append(f"data: [DONE]{line_end}{line_end}")
    data = "".join(lines).encode()
    events, tap = CanonicalEvents(), StreamTap(forward_usage=False)
    told = b""
    for start in range(0, len(data), step):
        told += tap.feed(events.feed(data[start : start + step]))
    assert events.finished
    assert tap.finished
    assert tap.text_events == 2
    assert tap.final is not None
    assert tap.final["usage"] == USAGE
    texts = [
        json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"].get("content", "")
        for event in told.split(b"\n\n")[:-1]
    ]
    assert "".join(texts) == "The sea\u2028"


def test_an_error_is_seen_wherever_it_stands_in_the_event() -> None:
    events, tap = CanonicalEvents(), StreamTap(forward_usage=False)
    tap.feed(events.feed(b'data: {"id": 1, "error": {"message": "overloaded"}}\n\n'))
    assert tap.failed


def test_no_error_is_none_and_the_end_is_the_end() -> None:
    events, tap = CanonicalEvents(), StreamTap(forward_usage=False)
    chunk = {"error": None, **CHUNKS[1]}
    told = tap.feed(events.feed(f"data: {json.dumps(chunk)}\n\n".encode()))
    assert json.loads(told.removeprefix(b"data: ")) == CHUNKS[1]
    tap.feed(events.feed(b'data: [DONE]\n\ndata: {"id": "late"}\n\ndata: [DONE]\n\n'))
    assert tap.finished
    assert not tap.failed


def test_what_is_no_json_goes_on_as_it_is() -> None:
    events = CanonicalEvents()
    assert events.feed(b"data: {oops\n\ndata: [1]\n\n") == b"data: {oops\n\ndata: [1]\n\n"
    assert events.feed(b"data: [DONE]\n\n") == DONE


def test_a_line_without_end_is_given_up() -> None:
    events = CanonicalEvents()
    events.feed(b"x" * 15 * 2**20)
    with pytest.raises(ValueError, match="does not end"):
        events.feed(b"x" * 2**21)
