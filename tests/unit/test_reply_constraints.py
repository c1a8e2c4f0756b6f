"""Grammars of replies: llguidance accepts what models should write, and nothing else.

The vocabulary here is one token a byte, with and without tokens for the formats' tags.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from serving.chat.reply import ReplyFormat, recognise
from serving.protocol.errors import ApiError
from serving.protocol.requests import Function
from tests.unit.test_reply_parser import (
    DEEPSEEK_BEGIN,
    DEEPSEEK_END,
    SOURCES,
    deepseek,
    deepseek_r1,
    hermes,
    read,
    to_function,
)

TAGS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]"),
    *("[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", DEEPSEEK_BEGIN, DEEPSEEK_END),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<|start|>", "<|end|>"),
    *("<|channel|>", "<|constrain|>", "<|message|>", "<|tool_call>", "<tool_call|>"),
    *("<|channel>", "<channel|>"),
)
END = 256
TOKEN_OF = {tag: END + 1 + place for place, tag in enumerate(TAGS)}
WEATHER = Function(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "maximum": 9},
            "units": {"enum": ["metric", "imperial"]},
            "area": {"$ref": "#/$defs/area"},
        },
        "$defs": {"area": {"type": "array", "items": {"type": "number"}}},
        "required": ["city"],
        "additionalProperties": False,
    },
)
FUNCTIONS = (WEATHER, Function(name="now"))
GOOD = '{"city": "Paris", "days": 2, "units": "metric", "area": [1.5]}'
BAD = (
    '{"city": "Paris", "days": "two"}',
    '{"days": 2}',
    '{"city": "Paris", "days": 12}',
    '{"city": "a", "b": 1}',
)


class _Bytes:
    eos_token_id = END
    bos_token_id = None
    tokens = [bytes([byte]) for byte in range(256)] + [
        b"\xff" + text.encode() for text in ("<|end_of_text|>", *TAGS)
    ]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@lru_cache(maxsize=1)
def tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def tokens_of(text: str, tags: bool) -> list[int]:
    if not tags:
        return list(text.encode())
    parts = re.split("(" + "|".join(map(re.escape, TAGS)) + ")", text)
    return [
        token
        for part in parts
        for token in ([TOKEN_OF[part]] if part in TOKEN_OF else part.encode())
    ]


def accepts(grammar: str, text: str, tags: bool) -> bool:
    matcher = LLMatcher(tokenizer(), grammar)
    assert not matcher.get_error()
    tokens = tokens_of(text, tags)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def form(name: str, tags: bool) -> ReplyFormat:
    return recognise(SOURCES[name], TOKEN_OF.get if tags else lambda _: None)


def xml(name: str, arguments: str) -> str:
    """Of the arguments above, the XML."""
    found = re.findall(r'"(\w+)": ("[^"]*"|\[.*?\]|\w+)', arguments)
    values = "".join(
        f"<parameter={key}>\n{value.strip(chr(34))}\n</parameter>\n" for key, value in found
    )
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def json_list(*calls: tuple[str, str]) -> str:
    return "[" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]"


def text_of(name: str, *calls: tuple[str, str]) -> str:
    """The calls as each format writes them."""
    match name:
        case "hermes" | "generic":
            return "\n".join(hermes(*call) for call in calls)
        case "qwen_coder":
            return "\n".join(xml(*call) for call in calls)
        case "llama3":
            return "".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)
        case "mistral_list":
            return "[TOOL_CALLS]" + json_list(*calls)
        case "mistral_id":
            return "".join(f"[TOOL_CALLS]{n}[CALL_ID]a12345678[ARGS]{a}" for n, a in calls)
        case "mistral":
            return "".join(f"[TOOL_CALLS]{n}[ARGS]{a}" for n, a in calls)
        case "deepseek_r1":
            inside = "\n".join(deepseek_r1(*call) for call in calls)
            return DEEPSEEK_BEGIN + inside + DEEPSEEK_END
        case "deepseek":
            inside = "\n".join(deepseek(*call) for call in calls)
            return DEEPSEEK_BEGIN + inside + DEEPSEEK_END
        case "harmony":
            return "".join(to_function(*call) for call in calls)
        case "gemma4":
            return "".join(f"<|tool_call>call:{n}{a}<tool_call|>" for n, a in calls)
    raise AssertionError(name)


CALL, NOW = ("get_weather", GOOD), ("now", "{}")
ALONE = ("llama3", "harmony")  # their models make one call a reply
each_format = pytest.mark.parametrize("name", sorted(SOURCES))
each_vocabulary = pytest.mark.parametrize("tags", [False, True], ids=["text", "tokens"])


def constraint(name: str, tags: bool, **options: Any) -> str:
    options = {"required": True, "parallel": True} | options
    return form(name, tags).constraint(FUNCTIONS, **options)


@each_format
@each_vocabulary
def test_a_required_call_is_a_valid_call(name: str, tags: bool) -> None:
    grammar = constraint(name, tags)
    for call in (CALL, NOW):
        assert accepts(grammar, text_of(name, call), tags)
    for arguments in BAD:
        assert not accepts(grammar, text_of(name, ("get_weather", arguments)), tags)
    assert not accepts(grammar, text_of(name, ("got_weather", GOOD)), tags)
    assert not accepts(grammar, "", tags)
    assert not accepts(grammar, "It rains.", tags)
    assert not accepts(grammar, f"So: {text_of(name, CALL)}", tags)


@each_format
@each_vocabulary
def test_several_calls_only_if_allowed(name: str, tags: bool) -> None:
    two = text_of(name, CALL, NOW)
    assert accepts(constraint(name, tags), two, tags) == (name not in ALONE)
    assert not accepts(constraint(name, tags, parallel=False), two, tags)
    assert not accepts(constraint(name, tags, parallel=False, required=False), two, tags)
    assert accepts(constraint(name, tags, parallel=False), text_of(name, CALL), tags)


@each_format
@each_vocabulary
@pytest.mark.parametrize("parallel", [True, False])
def test_free_text_is_free_but_its_calls_are_valid(name: str, tags: bool, parallel: bool) -> None:
    grammar = constraint(name, tags, required=False, parallel=parallel)
    final = "<|channel|>final<|message|>" if name == "harmony" else ""
    assert accepts(grammar, f"{final}It [rains] in <b>Paris</b>:\n{{5}}.", tags)
    assert accepts(grammar, text_of(name, CALL), tags)
    for arguments in BAD:
        assert not accepts(grammar, text_of(name, ("get_weather", arguments)), tags)
    if name not in ALONE:
        assert accepts(grammar, f"So:\n{text_of(name, CALL)}", tags)
        assert not accepts(grammar, f"So:\n{text_of(name, ('get_weather', BAD[0]))}", tags)


@each_format
@each_vocabulary
def test_what_is_accepted_is_read_as_calls(name: str, tags: bool) -> None:
    several = (CALL,) if name in ALONE else (CALL, NOW)
    reply = read(form(name, tags), text_of(name, *several))
    assert [call for call, _ in reply.calls] == [call for call, _ in several]
    assert reply.loaded[0][1] == {
        "city": "Paris",
        "days": 2,
        "units": "metric",
        "area": [1.5],
    }
    assert reply.content == ""


@each_vocabulary
@pytest.mark.parametrize(
    ("name", "opened", "closed"),
    [
        ("hermes", "<think>\n", "\n</think>\n\n"),
        ("qwen_coder", "<think>\n", "\n</think>\n\n"),
        ("mistral", "[THINK]", "[/THINK]"),
        ("gemma4", "<|channel>thought\n", "<channel|>"),
    ],
)
def test_reasoning_comes_first(name: str, opened: str, closed: str, tags: bool) -> None:
    call = text_of(name, CALL)
    grammar = constraint(name, tags)
    assert accepts(grammar, f"{opened}I {{wonder}}.{closed}{call}", tags)
    assert not accepts(grammar, f"{opened}I wonder.{closed}So.", tags)
    assert not accepts(grammar, f"I wonder.{closed}{call}", tags)
    begun = constraint(name, tags, thinking=True)
    assert accepts(begun, f"I wonder.{closed}{call}", tags)
    assert not accepts(begun, call, tags)


@each_vocabulary
def test_harmony_reasons_in_a_channel(tags: bool) -> None:
    thought = "<|channel|>analysis<|message|>I wonder.<|end|><|start|>assistant"
    call = text_of("harmony", CALL)
    assert accepts(constraint("harmony", tags), thought + call, tags)
    final = "<|channel|>final<|message|>It rains."
    assert not accepts(constraint("harmony", tags), thought + final, tags)
    assert accepts(constraint("harmony", tags, required=False), thought + final, tags)


@pytest.mark.parametrize(
    ("value", "good"),
    [("metric", True), ("imperial", True), ("kelvin", False), ("metrical", False)],
)
def test_choices_hold_in_xml(value: str, good: bool) -> None:
    arguments = f'{{"city": "Paris", "units": "{value}"}}'
    assert accepts(constraint("qwen_coder", False), xml("get_weather", arguments), False) == good


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": ["string", "null"]}, ("null", "two\nlines", ""), ()),
        ({"anyOf": [{"enum": ["a", "b"]}, {"type": "null"}]}, ("a", "null"), ("c", "nul")),
        ({"$ref": "#/$defs/side"}, ("left",), ("Left", "5")),
        ({"type": "array", "items": {"$ref": "#/$defs/side"}}, ('["left"]', "[]"), ("left", "[5]")),
        ({"enum": [1, "one", None]}, ("1", "one", "null"), ("2", "none")),
        ({}, ("anything", "[1"), ()),
    ],
)
def test_schemas_hold_in_xml(
    schema: dict[str, Any], good: Sequence[str], bad: Sequence[str]
) -> None:
    parameters = {
        "properties": {"a": schema},
        "required": ["a"],
        "$defs": {"side": {"type": "string", "enum": ["left", "right"]}},
    }
    functions = [Function(name="f", parameters=parameters)]
    grammar = form("qwen_coder", False).constraint(functions, required=True, parallel=False)
    for value in (*good, *bad):
        call = f"<parameter=a>\n{value}\n</parameter>\n</function>"
        text = f"<tool_call>\n<function=f>\n{call}\n</tool_call>"
        assert accepts(grammar, text, False) == (value in good), value


@each_format
@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "object", "properties": {"a": {"unevaluatedItems": False}}}, "unevaluatedItems"),
        ({"properties": {"a": {"$ref": "https://example.org/schema"}}}, "$ref"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    name: str, schema: dict[str, Any], keyword: str
) -> None:
    with pytest.raises(ApiError) as caught:
        form(name, False).constraint(
            [Function(name="f", parameters=schema)], required=True, parallel=False
        )
    error = caught.value
    assert (error.status, error.param) == (400, "tools")
    for part in ("'f'", keyword, "properties.a"):
        assert part in str(error)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"type": "string", "pattern": "^b+$"}}},
        {"properties": {"a": {"type": "string", "format": "date"}}},
        {"properties": {"a": {"anyOf": [{"type": "string", "minLength": 2}, {"type": "null"}]}}},
        {"properties": {"a": {}}, "minProperties": 1},
    ],
)
def test_xml_refuses_what_only_json_can_be_held_to(schema: dict[str, Any]) -> None:
    functions = [Function(name="f", parameters=schema)]
    assert form("hermes", False).constraint(functions, required=True, parallel=True)
    (keyword,) = {"pattern", "format", "minLength", "minProperties"} & set(
        re.findall(r"\w+", str(schema))
    )
    with pytest.raises(ApiError, match=f"{keyword}.*XML"):
        form("qwen_coder", False).constraint(functions, required=True, parallel=True)


def test_no_room_for_endless_white_space() -> None:
    grammar = constraint("hermes", False)
    assert accepts(grammar, hermes("get_weather", '{"city":"Paris"}'), False)
    assert not accepts(grammar, hermes("get_weather", '{"city":  "Paris"}'), False)
    assert not accepts(grammar, hermes("get_weather", '{\n"city": "Paris"}'), False)


def test_tags_are_tokens_where_there_are_tokens() -> None:
    grammar = constraint("hermes", True)
    assert not accepts(grammar, hermes("now", "{}"), False)


@pytest.mark.parametrize("parameters", [None, {}, {"properties": {"a": {"type": "string"}}}])
def test_arguments_are_an_object_whatever_the_schema_leaves_open(
    parameters: dict[str, Any] | None,
) -> None:
    functions: Sequence[Function] = [Function(name="f", parameters=parameters)]
    grammar = form("hermes", False).constraint(functions, required=True, parallel=False)
    assert accepts(grammar, hermes("f", "{}"), False)
    for value in ("5", "[]", "null", '"{}"'):
        assert not accepts(grammar, hermes("f", value), False)
    assert accepts(grammar, hermes("f", '{"a": "b"}'), False) == (parameters is not None)


def test_the_prompt_for_models_without_a_syntax_describes_tools_and_syntax() -> None:
    text = recognise(None).tool_prompt([WEATHER, Function(name="now", description="The time.")])
    assert '"name": "get_weather"' in text
    assert '"city": {"type": "string"}' in text
    assert "The time." in text
    assert '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}' in text
