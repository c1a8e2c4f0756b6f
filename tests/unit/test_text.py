"""Text leaves the engine in whole characters, and without its stop strings."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from serving.llamacpp.text import TextStream


def run(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    deltas = []
    for piece in pieces:
        deltas.append(stream.push(piece))
        if stream.stopped:
            return deltas, True
    return [*deltas, stream.finish()], stream.stopped


def split_at(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.text(), st.lists(st.integers(0, 1000)))
def test_any_split_of_any_text_comes_out_whole(text: str, cuts: list[int]) -> None:
    deltas, _ = run(split_at(text.encode(), cuts))
    assert "".join(deltas) == text
    assert all(
        "\N{REPLACEMENT CHARACTER}" not in delta or "\N{REPLACEMENT CHARACTER}" in text
        for delta in deltas
    )


@given(
    st.text("abX", max_size=30),
    st.sampled_from(["X", "ab", "aXb", "bba"]),
    st.lists(st.integers(0, 99)),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: str, cuts: list[int]) -> None:
    deltas, stopped = run(split_at(text.encode(), cuts), (stop,))
    assert stopped == (stop in text)
    assert "".join(deltas) == text.partition(stop)[0]


def test_a_character_is_held_until_its_last_byte() -> None:
    assert run(["é".encode()[:1], "é".encode()[1:]])[0] == ["", "é", ""]


def test_an_unfinished_character_at_the_end_is_marked() -> None:
    assert "".join(run([b"ok ", "é".encode()[:1]])[0]) == "ok \N{REPLACEMENT CHARACTER}"


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(("END",))
    assert stream.push(b"the E") == "the "
    assert stream.push(b"N") == ""
    assert stream.push(b"T") == "ENT"


def test_of_two_stop_strings_the_first_in_the_text_wins() -> None:
    assert run([b"one two three"], ("three", "two"))[0] == ["one "]
