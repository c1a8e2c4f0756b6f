"""How families of models write tool calls: each syntax as a reader and as a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from serving.chat.json_schema import Path, Unsupported
from serving.chat.reply.lark import (
    Lark,
    of_arguments,
    of_schema,
    parameters,
    refusal,
)
from serving.chat.reply.scanner import NotACall, Scanner, Wait
from serving.chat.reply.values import (
    ANYTHING,
    STRING,
    choices_of,
    kinds_of,
    options_of,
    resolved,
    to_json,
)
from serving.protocol.requests import Function

_GEMMA_QUOTE = '<|"|>'
_VALUE_END = "\n</parameter>\n"
_NEWLINE = '"\\n"'
# Text in tags is held to none of these.
_BEYOND_XML = frozenset(
    (
        *("pattern", "format", "minLength", "maxLength", "allOf"),
        *("minProperties", "maxProperties", "patternProperties"),
    )
)
_BARE = re.compile(r"[^\s:,{}\[\]<]*")


class CallSyntax(Protocol):
    """One way to write calls in the middle of text, in blocks that begin with a tag."""

    @property
    def openers(self) -> tuple[str, ...]:
        """The tags; the first is the proper one. Empty: calls begin with their JSON."""

    @property
    def separator(self) -> str | None:
        """What stands between blocks; None if all calls stand in one."""

    def read(self, text: Scanner, tag: str, functions: Sequence[Function]) -> Wait[None]:
        """Read the block behind ``tag``; :class:`NotACall` where it is none."""

    def block(self, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """An expression for the block behind its tag."""


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """``{"name": ..., "arguments": {...}}``, or a list of them, between tags."""

    openers: tuple[str, ...]
    close: str = ""
    arguments: str = "arguments"
    in_list: bool = False
    separator: str | None = None
    margin: str = ""

    def read(self, text: Scanner, tag: str, functions: Sequence[Function]) -> Wait[None]:
        # Answers may be JSON, too: behind no tag of its own, only what names a function is a call.
        own = tag and tag == self.openers[0]
        known = set() if own else {function.name for function in functions}
        yield from text.spaces()
        if (yield from text.skip("[")):
            yield from _json_call(text, known)
            while (yield from text.skip(",")):
                yield from _json_call(text, known)
            yield from text.close("]")
        else:
            yield from _json_call(text, known)
        yield from text.close("```" if tag.startswith("```") else self.close)

    def block(self, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        calls = lark.any_of(
            f'{_head(each, self.arguments)} {of_arguments(each)} "}}"' for each in functions
        )
        if self.in_list:
            calls = f'"[" {calls} (", " {calls})* "]"' if several else f'"[" {calls} "]"'
        close = lark.text(self.margin + self.close) if self.openers[0] else ""
        return f"{lark.text(self.margin)} {calls} {close}"


@dataclass(frozen=True, slots=True)
class NamedCalls:
    """A function's name, then its arguments as JSON, between tags; several in a section."""

    call: str
    after_name: str
    close: str = ""
    section: str = ""
    section_close: str = ""
    call_id: str = ""

    @property
    def openers(self) -> tuple[str, ...]:
        # Models forget to open the section.
        return (self.section, self.call) if self.section else (self.call,)

    @property
    def separator(self) -> str | None:
        return None if self.section else ""

    def read(self, text: Scanner, tag: str, functions: Sequence[Function]) -> Wait[None]:
        if tag != self.call:
            yield from text.spaces()
            yield from text.expect(self.call)
        while True:
            name = yield from text.word()
            if self.call_id and (yield from text.skip(self.call_id)):
                yield from text.word()
            yield from text.expect(self.after_name)
            yield from text.spaces()
            if (yield from text.peek()) != "{":
                raise NotACall
            text.begin_call(name)
            yield from text.json_value(text.arguments)
            yield from text.close(self.close.strip())
            yield from text.spaces()
            if not self.section or not (yield from text.skip(self.call)):
                break
        yield from text.close(self.section_close)

    def block(self, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        call_id = f"{lark.text(self.call_id)} /[a-zA-Z0-9]{{9}}/" if self.call_id else ""
        calls = lark.any_of(
            f"{lark.text(each.name)} {call_id} {lark.text(self.after_name)} {of_arguments(each)}"
            for each in functions
        )
        call = f"{lark.text(self.call if self.section else '')} {calls} {lark.text(self.close)}"
        more = f'("\\n" {call})*' if several and self.section else ""
        return f"{call} {more} {lark.text(self.section_close)}"


@dataclass(frozen=True, slots=True)
class XmlCalls:
    """``<function=name>`` with a ``<parameter=key>`` for each argument, between tags."""

    open: str
    close: str
    separator: str = "\n"

    @property
    def openers(self) -> tuple[str, ...]:
        # Qwen3-Coder forgets the outer tag now and then.
        return (self.open, "<function=")

    def read(self, text: Scanner, tag: str, functions: Sequence[Function]) -> Wait[None]:
        if tag == self.open:
            yield from text.spaces()
            yield from text.expect("<function=")
        name = yield from text.word()
        yield from text.expect(">")
        whole = next((parameters(each) for each in functions if each.name == name), {})
        schemas = resolved(whole.get("properties"), whole)
        text.begin_call(name)
        text.arguments("{")
        separator = ""
        yield from text.spaces()
        while (yield from text.skip("<parameter=")):
            key, _ = yield from text.before((">",))
            text.arguments(f"{separator}{to_json(key)}: ")
            separator = ", "
            yield from _xml_value(text, kinds_of(resolved(schemas.get(key), whole)))
            yield from text.spaces()
        if (yield from text.peek()):
            text.arguments("}")
        yield from text.close("</function>")
        yield from text.close(self.close)

    def block(self, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        calls = lark.any_of(_xml_call(lark, function) for function in functions)
        return f'"\\n" {calls} {lark.text(self.close)}'


@dataclass(frozen=True, slots=True)
class GemmaCalls:
    """Gemma 4's ``call:name{key:<|"|>text<|"|>,other:5}`` between tags."""

    openers: tuple[str, ...] = ("<|tool_call>",)
    close: str = "<tool_call|>"
    separator: str = ""

    def read(self, text: Scanner, tag: str, functions: Sequence[Function]) -> Wait[None]:
        yield from text.expect("call:")
        name = yield from text.word()
        if (yield from text.peek()) != "{":
            raise NotACall
        text.begin_call(name)
        depth = 0
        while True:
            yield from text.spaces()
            sign = yield from text.peek()
            if sign == '"':
                yield from text.json_value(text.arguments)
            elif sign and sign in "{[]},:":
                yield from text.expect(sign)
                depth += (sign in "{[") - (sign in "]}")
                text.arguments(sign)
            elif (yield from text.skip(_GEMMA_QUOTE)):
                yield from _string(text, (_GEMMA_QUOTE,))
            else:
                bare = yield from text.run(_BARE)
                yield from text.spaces()
                is_key = (yield from text.peek()) == ":"
                if not bare:
                    raise NotACall
                text.arguments(to_json(bare, STRING if is_key else ANYTHING))
            if depth <= 0:
                break
        yield from text.close(self.close)

    def block(self, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        # JSON proper: its quotes differ from Gemma's, but it can be held to a schema.
        calls = lark.any_of(f'"call:{each.name}" {of_arguments(each)}' for each in functions)
        return f"{calls} {lark.text(self.close)}"


def _head(function: Function, arguments: str) -> str:
    return json.dumps(f'{{"name": "{function.name}", "{arguments}": ')


def _json_call(text: Scanner, known: set[str]) -> Wait[None]:
    """One call as a JSON object whose keys may come in any order."""
    name = held = ""
    begun = False
    yield from text.spaces()
    yield from text.expect("{")
    while True:
        yield from text.spaces()
        key = yield from text.json_text()
        yield from text.spaces()
        yield from text.expect(":")
        yield from text.spaces()
        is_object = (yield from text.peek()) == "{"
        is_arguments = is_object and not begun and key in ('"arguments"', '"parameters"')
        if is_arguments and name:
            text.begin_call(name)
            begun = True
            yield from text.json_value(text.arguments)
        else:
            value = yield from text.json_text()
            if is_arguments:
                held = value
            elif key == '"name"' and value.startswith('"'):
                name = value.strip('"')
        if name and known and name not in known:
            raise NotACall
        yield from text.spaces()
        if not (yield from text.skip(",")):
            break
    if not begun:
        yield from text.expect("}")
        if not name or not held:
            raise NotACall
        text.begin_call(name)
        text.arguments(held)
    else:
        yield from text.close("}")
    yield from text.spaces()


def _xml_value(text: Scanner, kinds: frozenset[str]) -> Wait[None]:
    """One argument: a string streams, what else it may be shows at its end."""
    ends = (_VALUE_END.rstrip(), _VALUE_END.strip())
    yield from text.skip("\n")
    if kinds == STRING:
        yield from _string(text, ends)
    else:
        value, end = yield from text.before(ends)
        text.arguments(to_json(value, kinds) if end else value)


def _string(text: Scanner, ends: tuple[str, ...]) -> Wait[None]:
    """Text up to one of ``ends`` as an argument; what is cut off stays open."""
    text.arguments('"')
    if (yield from text.until(ends, lambda piece: text.arguments(to_json(piece)[1:-1]))):
        text.arguments('"')


def _xml_call(lark: Lark, function: Function) -> str:
    of_arguments(function)  # refuses what no syntax can be held to
    whole = parameters(function)
    parts = []
    try:
        _refuse(whole, (), _BEYOND_XML | {"anyOf", "oneOf", "$ref"})
        for key, schema in whole.get("properties", {}).items():
            rule = _xml_rule(lark, schema, whole, ("properties", key))
            part = f"{json.dumps(f'<parameter={key}>')} {_NEWLINE} {rule}"
            parts.append(part if key in whole.get("required", ()) else f"({part})?")
    except Unsupported as error:
        raise refusal(function, error) from error
    return f'"<function={function.name}>" {_NEWLINE} {" ".join(parts)} "</function>" {_NEWLINE}'


def _xml_rule(lark: Lark, schema: Any, whole: dict[str, Any], path: Path) -> str:
    """An expression for an argument and its end."""
    schema = resolved(schema, whole)
    if options := options_of(schema):
        return lark.any_of(_xml_rule(lark, option, whole, path) for option in options)
    if choices := choices_of(schema):
        written = (each if isinstance(each, str) else json.dumps(each) for each in choices)
        return f"{lark.any_of(map(json.dumps, written))} {json.dumps(_VALUE_END)}"
    kinds = kinds_of(schema)
    if not kinds or "string" in kinds:
        _refuse(schema, path, _BEYOND_XML)
        return lark.until(_VALUE_END)
    shared = {key: value for key, value in whole.items() if key in ("$defs", "definitions")}
    return f"{of_schema({**schema, **shared})} {json.dumps(_VALUE_END)}"


def _refuse(schema: Any, path: Path, keywords: frozenset[str]) -> None:
    for keyword in sorted(keywords.intersection(schema or ())):
        raise Unsupported(path, keyword, "cannot be enforced in the XML that this model writes")
