"""The client: what it makes of streams, good ones and bad ones."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.client import Client, Reply, ServerError, sse_events
from loadtest.records import RequestRecord
from tests.openai_server import MISSHAPEN, serving


@given(st.lists(st.integers(1, 60)))
def test_events_survive_every_split(sizes: list[int]) -> None:
    stream = b'data: {"a": "\xc3\xa9"}\n\n: a comment\n\ndata:{"b":2}\r\n\r\ndata: [DONE]\n\n'

    def reads() -> Iterator[tuple[float, bytes]]:
        at = 0
        for size in [*sizes, len(stream)]:
            yield float(at), stream[at : at + size]
            at += size

    events = list(sse_events(reads()))
    assert [data for _, data in events] == [b'{"a": "\xc3\xa9"}', b'{"b":2}', b"[DONE]"]
    # Each has the moment of the read that completed it.
    starts = [at for at, _ in reads()]
    for moment, data in events:
        line_end = stream.index(b"\n", stream.index(data)) + 1
        assert moment == max(start for start in starts if start < line_end)


def one_request(url: str) -> tuple[RequestRecord, Reply]:
    result = RequestRecord(number=0, user=0, warmup=False, started_at=time.monotonic())
    words = {"messages": [{"role": "user", "content": "a prompt"}], "max_tokens": 4}
    client = Client(url, None)
    reply = client.stream("/chat/completions", words, result, time.monotonic)
    client.close()
    return result, reply


def test_a_good_stream() -> None:
    with serving("good") as (url, _):
        result, reply = one_request(url)
    assert (result.error, reply.text, result.finish_reason) == (None, "abcd", "length")
    assert (result.prompt_tokens, result.completion_tokens) == (7, 4)
    assert len(result.chunk_gaps_seconds) == 3
    assert result.chunk_tokens is None
    assert result.first_token_at is not None
    assert result.started_at < result.sent_at < result.first_token_at <= result.ended_at


def test_reasoning_and_calls_are_timed_as_text_is() -> None:
    with serving("thinks and calls") as (url, _):
        result, reply = one_request(url)
    assert result.first_token_at is not None
    assert len(result.chunk_gaps_seconds) == 3
    assert reply.text == ""


def test_chunks_of_several_tokens_are_known_as_such() -> None:
    with serving("in pairs") as (url, _):
        result, _ = one_request(url)
    assert result.chunk_tokens == [2.0, 2.0]
    assert len(result.chunk_gaps_seconds) == 1
    assert result.chunk_gaps_seconds[0] > 0.09


@pytest.mark.parametrize("behaviour", MISSHAPEN)
def test_misshapen_streams_are_errors_with_their_reason(behaviour: str) -> None:
    with serving(behaviour) as (url, _):
        result, _ = one_request(url)
    _, error, message = MISSHAPEN[behaviour]
    assert result.error == error
    assert message in (result.error_message or "")
    assert result.first_token_at is not None


def test_a_stream_without_its_end_is_incomplete() -> None:
    with serving("no end") as (url, _):
        result, _ = one_request(url)
    assert (result.error, result.finish_reason) == ("incomplete_stream", "length")


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    with serving("good") as (url, _):
        client = Client(url, None)
        assert client.models() == ["tiny"]
        time.sleep(0.8)  # it hangs up on idle clients after half a second
        assert client.models() == ["tiny"]
        client.close()


def test_who_is_not_there_is_named() -> None:
    with pytest.raises(ServerError, match=r"cannot reach 127\.0\.0\.1:9"):
        Client("http://127.0.0.1:9/v1", None).models()
    with pytest.raises(ServerError, match="http://HOST:PORT/v1"):
        Client("127.0.0.1:9", None)
