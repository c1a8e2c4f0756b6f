"""Reading text that arrives in pieces, as if all of it were there.

What reads it are generators: they yield where they need more text, and are resumed when there is some.
So a reader decides the same however the text was split.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

from serving.chat.reply.deltas import ContentDelta, ReasoningDelta, ReplyDelta, ToolCallDelta

_T = TypeVar("_T")
Wait = Generator[None, None, _T]
Sink = Callable[[str], object]

_SPACES = re.compile(r"\s*")
_WORD = re.compile(r"[\w.-]*")
_SCALAR = re.compile(r"[\w.+-]*")
_IN_STRING = re.compile(r'[^"\\]*')
# In the middle of text, the first character of a tag may be just that.
_CERTAIN = 2
_BETWEEN_STRINGS = re.compile(r"[\s\w:,.+-]*")


class NotACall(Exception):
    """What looked like a call is none; what was not delivered of it is text."""


class Scanner:
    """The text so far, a place in it, and the deltas made of what was delivered."""

    def __init__(self) -> None:
        self.ended = False
        self.cut_off = False
        self.calls = 0
        self._text = ""
        self._at = 0
        # Everything before the mark is delivered, or was syntax.
        self._mark = 0
        self._deltas: list[ReplyDelta] = []

    def feed(self, text: str) -> None:
        """Add to the text, and forget what is dealt with."""
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0

    @property
    def broke_off(self) -> bool:
        """Whether the end came in the middle of what is not dealt with."""
        return self.cut_off and self._mark < self._at == len(self._text)

    def take_deltas(self) -> list[ReplyDelta]:
        """What was delivered since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def content(self, text: str) -> None:
        """Deliver text of the answer."""
        self.accept(ContentDelta(text))

    def reasoning(self, text: str) -> None:
        """Deliver text of the reasoning."""
        self.accept(ReasoningDelta(text))

    def begin_call(self, name: str) -> None:
        """Deliver that a call begins: from here on its text is no longer content."""
        self.accept(ToolCallDelta(self.calls, f"call_{secrets.token_hex(12)}", name, ""))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """Deliver more arguments of the call that was begun last."""
        self.accept(ToolCallDelta(self.calls - 1, None, None, text))

    def accept(self, *deltas: ReplyDelta) -> None:
        """What was read is dealt with: delivered, or syntax."""
        self._deltas += deltas
        self._mark = self._at

    def rewind(self) -> None:
        """Go back to what is not dealt with."""
        self._at = self._mark

    def give_up(self, tag: str, sink: Sink) -> None:
        """Go back to ``tag``, which comes first of what is not dealt with: it is text."""
        self._at = self._mark + len(tag)
        sink(tag)

    def peek(self) -> Wait[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def spaces(self) -> Wait[None]:
        """Step over white space."""
        yield from self.run(_SPACES)

    def word(self) -> Wait[str]:
        """A name; :class:`NotACall` if none comes."""
        word = yield from self.run(_WORD)
        if not word:
            raise NotACall
        return word

    def run(self, pattern: re.Pattern[str], sink: Sink | None = None) -> Wait[str]:
        """As much as the pattern takes, given to ``sink`` as it comes."""
        pieces: list[str] = []
        while True:
            piece = pattern.match(self._text, self._at)[0]  # type: ignore[index]  # it takes nothing, too
            self._at += len(piece)
            pieces.append(piece)
            if piece and sink:
                sink(piece)
            if self._at < len(self._text) or self.ended:
                return "".join(pieces)
            yield

    def skip(self, literal: str) -> Wait[bool]:
        """Step over ``literal`` if it comes next; tells whether it did.

        If the end cuts it off, what there is of it is stepped over.
        """
        while not self._text.startswith(literal, self._at):
            rest = self._text[self._at :]
            if self.ended or not literal.startswith(rest):
                if self.cut_off and literal.startswith(rest):
                    self._at = len(self._text)
                return False
            yield
        self._at += len(literal)
        return True

    def expect(self, literal: str) -> Wait[None]:
        """Step over ``literal``; :class:`NotACall` if something else comes."""
        if not (yield from self.skip(literal)):
            raise NotACall

    def close(self, literal: str = "") -> Wait[None]:
        """What ends a call that was made: ``literal`` after white space, possibly cut off or missing."""
        self.accept()
        yield from self.spaces()
        if not (yield from self.skip(literal)) and literal.startswith(self._text[self._at :]):
            self._at = len(self._text)
        self.accept()

    def until(self, tags: tuple[str, ...], sink: Sink) -> Wait[str]:
        """Give ``sink`` all text before the first of ``tags``, step over that; empty if none comes.

        One that the end cuts off is stepped over, too.
        """
        pattern = _first_of(tags)
        while True:
            match = pattern.search(self._text, self._at)
            tag = match[0] if match and match[0] in tags else ""
            is_broken = self.cut_off and match is not None and len(match[0]) >= _CERTAIN
            is_held = tag or is_broken or not self.ended
            stop = match.start() if match and is_held else len(self._text)
            text = self._text[self._at : stop]
            self._at = stop
            if text:
                sink(text)
            self._at = len(self._text) if is_broken and not tag else stop + len(tag)
            if tag or self.ended:
                return tag
            yield

    def before(self, tags: tuple[str, ...]) -> Wait[tuple[str, str]]:
        """The text before the first of ``tags``, and that; it is not delivered yet."""
        pieces: list[str] = []
        tag = yield from self.until(tags, pieces.append)
        return "".join(pieces), tag

    def json_value(self, sink: Sink) -> Wait[None]:
        """One JSON value, given to ``sink`` as it comes; :class:`NotACall` where it cannot be one."""
        depth = 0
        while True:
            character = yield from self.peek()
            if character == '"':
                yield from self._json_string(sink)
            elif character and character in ("{}[]" if depth else "{["):
                depth += 1 if character in "{[" else -1
                self._at += 1
                sink(character)
            elif not (yield from self.run(_BETWEEN_STRINGS if depth else _SCALAR, sink)):
                raise NotACall
            if not depth:
                return

    def json_text(self) -> Wait[str]:
        """One JSON value, whole."""
        pieces: list[str] = []
        yield from self.json_value(pieces.append)
        return "".join(pieces)

    def _json_string(self, sink: Sink) -> Wait[None]:
        self._at += 1
        sink('"')
        while True:
            yield from self.run(_IN_STRING, sink)
            character = yield from self.peek()
            self._at += len(character)
            if character == "\\":
                escaped = yield from self.peek()
                self._at += len(escaped)
                sink(character + escaped)
            elif character:
                sink(character)
                return
            else:
                raise NotACall


@lru_cache(maxsize=256)
def _first_of(tags: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first tag, or the beginning of one at the end of the text."""
    whole = [re.escape(tag) for tag in tags]
    cut_off = [rf"{re.escape(tag[:end])}\Z" for tag in tags for end in range(len(tag) - 1, 0, -1)]
    return re.compile("|".join([*whole, *cut_off]) or r"(?!)")
