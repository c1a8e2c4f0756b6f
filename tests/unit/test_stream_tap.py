"""The gateway relays a stream byte for byte, and reads only its usage."""

from __future__ import annotations

import pytest

from serving.gateway.stream import StreamTap

EVENTS = [
    b'data: {"choices":[{"delta":{"role":"assistant"},"finish_reason":null}],"usage":null}\n\n',
    b'data: {"choices":[{"delta":{"content":"say \\"usage\\":{ and data: [DONE]"},'
    b'"finish_reason":null}],"usage":null}\n\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}],"usage":null}\n\n',
]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b"".join([*EVENTS, USAGE, DONE])


@pytest.mark.parametrize("size", range(1, len(STREAM) + 1))
@pytest.mark.parametrize("forward_usage", [True, False])
def test_every_split_of_a_stream_gives_the_same(size: int, forward_usage: bool) -> None:
    tap = StreamTap(forward_usage=forward_usage)
    out = b"".join(tap.feed(STREAM[at : at + size]) for at in range(0, len(STREAM), size))
    assert out == b"".join([*EVENTS, USAGE] if forward_usage else EVENTS)
    assert tap.final is not None
    assert tap.final["usage"]["prompt_tokens"] == 3
    assert tap.finished
    assert not tap.failed
    assert tap.text_events == 1


def test_an_error_event_marks_the_stream_as_failed() -> None:
    tap = StreamTap(forward_usage=False)
    data = EVENTS[0] + b'data: {"error":{"message":"no"}}\n\n'
    assert tap.feed(data) == data
    assert tap.failed
    assert not tap.finished


def test_half_an_event_is_not_sent() -> None:
    tap = StreamTap(forward_usage=False)
    assert tap.feed(EVENTS[0] + b'data: {"cho') == EVENTS[0]


def test_calls_and_reasoning_count_as_text() -> None:
    tap = StreamTap(forward_usage=False)
    for delta in (b'{"reasoning_content":"hm"}', b'{"tool_calls":[{"index":0}]}'):
        tap.feed(b'data: {"choices":[{"delta":' + delta + b',"finish_reason":null}]}\n\n')
    assert tap.text_events == 2
