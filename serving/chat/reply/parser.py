"""From generated text to the parts of a chat message."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.chat.reply.calls import CallSyntax
from serving.chat.reply.deltas import ReplyDelta
from serving.chat.reply.scanner import NotACall, Scanner, Sink, Wait
from serving.protocol.requests import Function


class ReplyParser:
    """Reads one reply. Whatever the text, nothing raises, and the deltas do not depend on its splits."""

    def __init__(self, read: Callable[[Scanner], Wait[None]]) -> None:
        self._text = Scanner()
        self._reader = read(self._text)

    @property
    def made_tool_calls(self) -> bool:
        """Whether a call has begun."""
        return self._text.calls > 0

    def push(self, text: str) -> list[ReplyDelta]:
        """Add generated text; returns what is certain now."""
        self._text.feed(text)
        next(self._reader, None)
        return self._text.take_deltas()

    def finish(self, *, cut_off: bool = False) -> list[ReplyDelta]:
        """What was held back, at the end of generation.

        ``cut_off``: the reply was to go on. What has begun like a tag or a call then is no text.
        """
        self._text.ended = True
        self._text.cut_off = cut_off
        return self.push("")


def read_reply(
    text: Scanner,
    syntax: CallSyntax | None,
    functions: Sequence[Function],
    reasoning: tuple[str, str] | None,
    thinking: bool,
) -> Wait[None]:
    """Reasoning first, if the reply begins with it; then content, with calls anywhere in it."""
    openers = syntax.openers if syntax else ()
    tags = tuple(filter(None, openers))
    sink: Sink = text.content
    ends: tuple[str, ...] = ()
    if reasoning:
        opened, closed = reasoning
        yield from text.spaces()
        if thinking or (yield from text.skip(opened)):
            sink, ends = text.reasoning, (f"\n{closed}", closed)
            yield from text.close()
        elif text.broke_off:
            return
        text.rewind()
    at_start = not ends
    while True:
        tag = ""
        if not ("" in openers and at_start and (yield from _json_follows(text))):
            tag = yield from text.until((*ends, *tags), sink)
            if not tag:
                return
        if tag not in ends:
            assert syntax is not None
            calls = text.calls
            try:
                yield from syntax.read(text, tag, functions)
            except NotACall:
                # What stands in a block of code may be the answer.
                if tag and text.broke_off and not tag.startswith("```"):
                    return
                text.rewind()
                if tag and text.calls == calls:
                    text.give_up(tag, sink)
                at_start = False
                continue
        # A call in the middle of reasoning ends it, too.
        sink, ends, at_start = text.content, (), True
        yield from text.close()


def _json_follows(text: Scanner) -> Wait[bool]:
    yield from text.spaces()
    if (yield from text.peek()) == "{":
        return True
    text.rewind()
    return False
