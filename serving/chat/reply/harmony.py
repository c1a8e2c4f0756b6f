"""gpt-oss's harmony: a reply is several messages, each with a header that says whom it is for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serving.chat.reply.lark import Lark, of_arguments
from serving.chat.reply.scanner import Scanner, Sink, Wait
from serving.protocol.requests import Function

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


@dataclass(frozen=True, slots=True)
class Harmony:
    """Channels: ``analysis`` is reasoning, ``commentary`` to a function a call, the rest content."""

    def read_reply(self, text: Scanner, *, tools: bool) -> Wait[None]:
        """Read all messages; the first one's header is open already."""
        header = " to=" if (yield from text.skip(" to=")) else ""
        while True:
            header = header or (yield from text.until((_START, _CHANNEL, *_ENDS), text.content))
            if not header:
                return
            if header in _ENDS:
                text.accept()
                header = ""
                continue
            rest, end = yield from text.before((_MESSAGE, _START, *_ENDS, "\n"))
            if end != _MESSAGE and text.broke_off:
                return
            if end != _MESSAGE:
                # No header: what was read is text, up to the tag that shows it.
                text.give_up(header, text.content)
                header = ""
                continue
            sink: Sink = text.content
            header += rest
            called = _RECIPIENT.search(header)
            if called and tools:
                text.begin_call(called[1])
                sink = text.arguments
            elif f"{_CHANNEL}analysis" in header:
                sink = text.reasoning
            text.accept()
            header = yield from text.until((*_ENDS, _START, _CHANNEL), sink)

    def constraint(self, lark: Lark, functions: Sequence[Function], *, required: bool) -> str:
        """A grammar of replies whose calls are valid; harmony makes one call a reply."""
        format_ = lark.text(f" <|constrain|>json{_MESSAGE}")
        calls = lark.any_of(f'"{each.name}" {format_} {of_arguments(each)}' for each in functions)
        call = f"{lark.text(f'{_CHANNEL}commentary to=functions.')} {calls}"
        analysis = _message(lark, "analysis")
        if required:
            return lark.finish(f"({analysis})* {call}")
        preamble = _message(lark, "commentary")
        final = f"{lark.text(f'{_CHANNEL}final{_MESSAGE}')} TEXT"
        return lark.finish(f"({analysis} | {preamble})* ({call} | {final})")

    def before_form(self, lark: Lark) -> str:
        """A grammar of reasoning and then ``@form`` on the final channel."""
        final = lark.text(f"{_CHANNEL}final{_MESSAGE}")
        return lark.finish(f"({_message(lark, 'analysis')})* {final} @form")


def _message(lark: Lark, channel: str) -> str:
    """An expression for a message on a channel, and the beginning of the next."""
    again = lark.text(f"{_START}assistant")
    return f"{lark.text(f'{_CHANNEL}{channel}{_MESSAGE}')} {lark.until('<|end|>')} {again}"
