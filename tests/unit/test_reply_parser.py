"""Generated text becomes content, reasoning and calls, however it is split."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.chat.reply import (
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
    ReplyFormat,
    ToolCallDelta,
    recognise,
)
from serving.protocol.requests import Function
from tests.unit import test_reply_formats as templates

WEATHER = Function(
    name="get_weather",
    description="Tells the weather.",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "units": {"enum": ["metric", "imperial"]},
            "near": {"type": "array", "items": {"type": "string"}},
            "exact": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
NOW = Function(name="now")
FUNCTIONS = (WEATHER, NOW)
PARIS = {"city": 'Pa"r}is\n', "days": 2, "near": ["Île", "]"], "exact": True}
PARIS_JSON = json.dumps(PARIS, ensure_ascii=False)
SOURCES = {
    "hermes": templates.QWEN + templates.THINKING,
    "qwen_coder": templates.QWEN_CODER + templates.THINKING,
    "llama3": templates.LLAMA,
    "mistral_list": templates.MISTRAL_NEMO,
    "mistral_id": templates.MISTRAL_SMALL,
    "mistral": templates.MAGISTRAL,
    "deepseek_r1": templates.DEEPSEEK_R1 + templates.THINKING,
    "deepseek": templates.DEEPSEEK_V3_1 + templates.THINKING,
    "harmony": templates.HARMONY,
    "gemma4": templates.GEMMA_4,
    "generic": templates.GEMMA_3,
}
FORMATS = {name: recognise(source) for name, source in SOURCES.items()}


@dataclass(frozen=True)
class Reply:
    """All of a reply; a call is its name and its arguments."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]

    @property
    def loaded(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def join(deltas: Iterable[ReplyDelta]) -> Reply:
    content = reasoning = ""
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif isinstance(delta, ReasoningDelta):
            reasoning += delta.text
        elif delta.id is not None:
            assert delta.name is not None
            assert delta.index == len(calls)
            calls.append([delta.name, delta.arguments])
        else:
            assert delta.name is None
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    return Reply(content, reasoning, tuple((name, arguments) for name, arguments in calls))


def read(form: ReplyFormat, *pieces: str, tools: bool = True, thinking: bool = False) -> Reply:
    parser = form.parser(tools=tools, thinking=thinking, functions=FUNCTIONS)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    reply = join([*deltas, *parser.finish()])
    assert parser.made_tool_calls == bool(reply.calls)
    return reply


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


XML = """<tool_call>
<function=get_weather>
<parameter=city>
Pa"r}is

</parameter>
<parameter=days>
2
</parameter>
<parameter=near>
["Île", "]"]
</parameter>
<parameter=exact>
True
</parameter>
</function>
</tool_call>"""
XML_NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
GEMMA = (
    '<|tool_call>call:get_weather{city:<|"|>Pa"r}is\n<|"|>,days:2,near:[<|"|>Île<|"|>,<|"|>]<|"|>],'
    "exact:true}<tool_call|>"
)
DEEPSEEK_BEGIN, DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def deepseek_r1(name: str, arguments: str) -> str:
    return (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"
        "<｜tool▁call▁end｜>"
    )


def deepseek(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def to_function(name: str, arguments: str) -> str:
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


BOTH: Sequence[tuple[str, Any]] = (("get_weather", PARIS), ("now", {}))
# Of each format: text as models write it, and what is in it.
SAMPLES: Sequence[tuple[str, str, str, str, Sequence[tuple[str, Any]]]] = (
    (
        "hermes",
        "<think>\nHm.\n</think>\n\nLet me see.\n"
        + hermes("get_weather", PARIS_JSON)
        + "\n"
        + hermes("now", "{}"),
        "Let me see.\n",
        "Hm.",
        BOTH,
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>',
        "",
        "",
        [("get_weather", {"city": "Rome"})],
    ),
    (
        "hermes",
        '<tool_call>\n[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {"a": 1}}]\n</tool_call>',
        "",
        "",
        [("now", {}), ("now", {"a": 1})],
    ),
    ("qwen_coder", f"<think>\n\n</think>\n\nOk.\n\n{XML}\n{XML_NOW}", "Ok.\n\n", "", BOTH),
    ("qwen_coder", XML.removeprefix("<tool_call>\n"), "", "", BOTH[:1]),
    (
        "llama3",
        f'{{"name": "get_weather", "parameters": {PARIS_JSON}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        "",
        BOTH,
    ),
    (
        "llama3",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS_JSON}}}',
        "",
        "",
        BOTH[:1],
    ),
    ("llama3", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', "", []),
    (
        "mistral_list",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS_JSON}, "id": "012345678"}}, '
        '{"name": "now", "arguments": {}, "id": "012345679"}]',
        "",
        "",
        BOTH,
    ),
    (
        "mistral_id",
        f"Wait.[TOOL_CALLS]get_weather[CALL_ID]012345678[ARGS]{PARIS_JSON}"
        "[TOOL_CALLS]now[CALL_ID]012345679[ARGS]{}",
        "Wait.",
        "",
        BOTH,
    ),
    (
        "mistral",
        f"[THINK]Hm.[/THINK]Wait.[TOOL_CALLS]get_weather[ARGS]{PARIS_JSON}[TOOL_CALLS]now[ARGS]{{}}",
        "Wait.",
        "Hm.",
        BOTH,
    ),
    (
        "deepseek_r1",
        "<think>\nHm.\n</think>\nSo."
        + DEEPSEEK_BEGIN
        + deepseek_r1("get_weather", PARIS_JSON)
        + "\n"
        + deepseek_r1("now", "{}")
        + DEEPSEEK_END,
        "So.",
        "Hm.",
        BOTH,
    ),
    (
        "deepseek",
        DEEPSEEK_BEGIN + deepseek("get_weather", PARIS_JSON) + deepseek("now", "{}") + DEEPSEEK_END,
        "",
        "",
        BOTH,
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait."
        "<|end|><|start|>assistant" + to_function("get_weather", PARIS_JSON),
        "Wait.",
        "Hm.",
        BOTH[:1],
    ),
    (
        "harmony",
        f" to=functions.get_weather<|channel|>commentary json<|message|>{PARIS_JSON}<|call|>",
        "",
        "",
        BOTH[:1],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>It is 5 < 6.",
        "It is 5 < 6.",
        "Hm.",
        [],
    ),
    (
        "gemma4",
        f"<|channel>thought\nHm.\n<channel|>{GEMMA}<|tool_call>call:now{{}}<tool_call|>",
        "",
        "Hm.",
        BOTH,
    ),
    ("gemma4", f"<|tool_call>call:get_weather{PARIS_JSON}<tool_call|>", "", "", BOTH[:1]),
    ("generic", hermes("get_weather", PARIS_JSON) + " done", "done", "", BOTH[:1]),
    ("generic", '```json\n{"name": "now", "parameters": {}}\n```', "", "", BOTH[1:]),
    ("generic", 'So: ```json\n{"name": "Bob"}\n```', 'So: ```json\n{"name": "Bob"}\n```', "", []),
    ("generic", '{"name": "now", "arguments": {}}', "", "", BOTH[1:]),
)
TEXTS = [(name, text) for name, text, *_ in SAMPLES]


@pytest.mark.parametrize(("name", "text", "content", "reasoning", "calls"), SAMPLES)
def test_samples(
    name: str, text: str, content: str, reasoning: str, calls: Sequence[tuple[str, Any]]
) -> None:
    reply = read(FORMATS[name], text)
    assert (reply.content, reply.reasoning, reply.loaded) == (content, reasoning, list(calls))


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_wherever_a_text_is_split_it_says_the_same(name: str, text: str) -> None:
    form = FORMATS[name]
    whole = read(form, text)
    assert read(form, *text) == whole
    for place in range(len(text)):
        assert read(form, text[:place], text[place:]) == whole


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_nothing_is_taken_back(name: str, text: str) -> None:
    """What a cut-off text says is the beginning of what the whole says, but for its last tag."""
    form = FORMATS[name]
    whole = read(form, text)
    for place in range(len(text)):
        parser = form.parser(tools=True, thinking=False, functions=FUNCTIONS)
        early = join(parser.push(text[:place]))
        assert whole.content.startswith(early.content)
        assert whole.reasoning.startswith(early.reasoning)
        for (name_early, arguments_early), (name_whole, arguments_whole) in zip(
            early.calls, whole.calls, strict=False
        ):
            assert name_early == name_whole
            assert arguments_whole.startswith(arguments_early)
        assert len(early.calls) <= len(whole.calls)


def pieces_of(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def garbage(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A format, and parts of its samples shuffled with noise, in pieces."""
    name, sample = draw(st.sampled_from(TEXTS))
    parts = draw(
        st.lists(
            st.one_of(
                st.tuples(st.integers(0, len(sample)), st.integers(0, 40)).map(
                    lambda at: sample[at[0] : at[0] + at[1]]
                ),
                st.text(alphabet='<>{}[]()|"\\ \n`:,=/abf1｜▁', max_size=8),
                st.sampled_from(
                    ["<tool_call>", "</think>", "[TOOL_CALLS]", "{", '"name": "f"', XML]
                ),
            ),
            max_size=10,
        )
    )
    return name, pieces_of(draw, "".join(parts))


@pytest.mark.parametrize(("name", "text"), TEXTS)
def test_wherever_a_text_goes_astray_the_rest_is_not_lost(name: str, text: str) -> None:
    for place in range(len(text)):
        reply = read(FORMATS[name], text[:place], " ☃ and ☃")
        everything = reply.content + reply.reasoning + str(reply.calls)
        assert everything.count("☃") == 2


@settings(max_examples=400, deadline=None)
@given(garbage(), st.booleans(), st.booleans())
def test_garbage_raises_nothing_and_splits_do_not_matter(
    case: tuple[str, list[str]], tools: bool, thinking: bool
) -> None:
    name, pieces = case
    form = FORMATS[name]
    whole = read(form, "".join(pieces), tools=tools, thinking=thinking)
    assert read(form, *pieces, tools=tools, thinking=thinking) == whole


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.text(alphabet="ab <>{}[]|\"'`:=/_▁｜\n", max_size=60),
)
def test_text_without_whole_tags_comes_out_as_it_went_in(name: str, text: str) -> None:
    reply = read(FORMATS[name], *text)
    assert reply == Reply(text, "", ())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>not JSON</tool_call>"),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": 5}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f"'),
        ("hermes", "<tool_call>" * 3),
        ("qwen_coder", "<tool_call><function>f</function>"),
        ("llama3", '<|python_tag|>brave_search.call(query="rain")'),
        ("mistral", "[TOOL_CALLS]now[ARGS]5"),
        ("deepseek", f"{DEEPSEEK_BEGIN}now"),
        ("harmony", "plain <|channel|>text\nof two lines"),
        ("gemma4", "<|tool_call>call me<tool_call|>"),
        ("generic", "{ this is } prose"),
    ],
)
def test_what_is_no_call_is_content(name: str, text: str) -> None:
    assert read(FORMATS[name], *text) == Reply(text, "", ())


def test_a_tag_that_fails_does_not_hide_the_next() -> None:
    reply = read(FORMATS["hermes"], "<tool_call>oh " + hermes("now", "{}"))
    assert reply == Reply("<tool_call>oh ", "", (("now", "{}"),))


def test_a_call_is_complete_without_its_closing_tag() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}'
    assert read(FORMATS["hermes"], text).calls == (("now", "{}"),)
    assert read(FORMATS["hermes"], f"{text}\n{text}</tool").calls == (("now", "{}"),) * 2


def test_arguments_cut_off_are_what_came() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Par\\'
    assert read(FORMATS["hermes"], text) == Reply("", "", (("get_weather", '{"city": "Par\\'),))
    text = "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"
    assert read(FORMATS["qwen_coder"], text) == Reply("", "", (("get_weather", '{"city": "Par'),))


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, text in TEXTS if name not in ("llama3", "generic")]
)
def test_what_is_cut_off_leaks_no_tags(name: str, text: str) -> None:
    form = FORMATS[name]
    whole = read(form, text)
    for place in range(len(text)):
        parser = form.parser(tools=True, thinking=False, functions=FUNCTIONS)
        early = join([*parser.push(text[:place]), *parser.finish(cut_off=True)])
        # One character may be text that ends so, as well.
        assert whole.content.startswith((early.content, early.content[:-1]))
        assert whole.reasoning.startswith((early.reasoning, early.reasoning[:-1]))


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("hermes", "It is <tool_", "It is "),
        ("hermes", '<tool_call>{"na', ""),
        ("hermes", "a <", "a <"),
        ("hermes", "a <b", "a <b"),
        ("mistral", "[TOOL_CALLS]no", ""),
        ("harmony", "<|channel|>anal", ""),
        ("llama3", '{"answer": "all is', '{"answer": "all is'),
        ("generic", '```json\n{"answer": "all is', '```json\n{"answer": "all is'),
    ],
)
def test_what_is_cut_off_in_a_tag_is_no_text(name: str, text: str, content: str) -> None:
    parser = FORMATS[name].parser(tools=True, thinking=False, functions=FUNCTIONS)
    assert join([*parser.push(text), *parser.finish(cut_off=True)]).content == content


def test_deep_nesting_is_no_recursion() -> None:
    deep = "[" * 20_000
    for start in ('<tool_call>{"arguments": ', '<tool_call>{"name": "f", "arguments": {"a": '):
        read(FORMATS["hermes"], start + deep)
    read(FORMATS["hermes"], '<tool_call>{"arguments": ' + deep + "]" * 20_000 + ', "name": "f"}')
    read(FORMATS["gemma4"], "<|tool_call>call:f{a:" + deep)
    read(FORMATS["qwen_coder"], f"<function=now>\n<parameter=a>\n{deep}{']' * 20_000}</parameter>")


def test_content_comes_at_once_and_arguments_in_pieces() -> None:
    parser = FORMATS["hermes"].parser(tools=True, thinking=False)
    assert parser.push("Hello <b") == [ContentDelta("Hello <b")]
    assert parser.push("> <tool") == [ContentDelta("> ")]
    assert parser.push('_call>{"name": "f", "arg') == []
    assert join(parser.push('uments": {"text": "so')).calls == (("f", '{"text": "so'),)
    (delta,) = parser.push(" far")
    assert not isinstance(delta, ContentDelta | ReasoningDelta)
    assert (delta.index, delta.id, delta.name, delta.arguments) == (0, None, None, " far")


def test_ids_of_calls_are_their_own() -> None:
    parser = FORMATS["hermes"].parser(tools=True, thinking=False)
    deltas = parser.push(hermes("now", "{}") * 2)
    ids = {delta.id for delta in deltas if not isinstance(delta, ContentDelta | ReasoningDelta)}
    ids.discard(None)
    assert len(ids) == 2
    assert all(each and each.startswith("call_") for each in ids)


def test_without_tools_tags_of_calls_are_text() -> None:
    text = hermes("now", "{}")
    assert read(FORMATS["hermes"], text, tools=False) == Reply(text, "", ())


def test_a_prompt_may_open_the_reasoning() -> None:
    form = FORMATS["hermes"]
    reply = read(form, "\nHm, <b>.\n</think>\n\nYes </think>.", thinking=True)
    assert reply == Reply("Yes </think>.", "Hm, <b>.", ())
    assert read(form, "Hm", thinking=True) == Reply("", "Hm", ())
    # A call in the middle of reasoning is made.
    assert read(form, f"Hm. {hermes('now', '{}')}", thinking=True).loaded == [("now", {})]


def test_tags_of_reasoning_count_at_the_beginning_only() -> None:
    text = "The tag <think> opens it, </think> closes it."
    assert read(FORMATS["hermes"], text) == Reply(text, "", ())
    assert read(FORMATS["llama3"], f"<think>{text}") == Reply(f"<think>{text}", "", ())


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "5", "5"),
        ("city", "true", "true"),
        ("city", "  two lines\n\tof text\n", "  two lines\n\tof text\n"),
        ("city", "", ""),
        ("days", "5", 5),
        ("days", "five", "five"),
        ("days", "NaN", "NaN"),
        ("exact", "None", None),
        ("exact", "False", False),
        ("exact", "3", "3"),
        ("units", "metric", "metric"),
        ("near", '["a"]', ["a"]),
        ("unheard_of", '{"a": 1}', {"a": 1}),
        ("unheard_of", "text", "text"),
    ],
)
def test_values_in_xml_are_of_the_types_their_schema_says(key: str, text: str, value: Any) -> None:
    form = FORMATS["qwen_coder"]
    call = f"<function=get_weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>"
    assert read(form, *f"<tool_call>\n{call}\n</tool_call>").loaded == [
        ("get_weather", {key: value})
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": 5},
        {"properties": {"a": 5}},
        {"properties": {"a": {"type": 5}}},
        {"properties": {"a": {"type": [{}]}}},
        {"properties": {"a": {"enum": 5}}},
        {"properties": {"a": {"anyOf": 5}}},
    ],
)
def test_a_schema_that_is_none_says_nothing_of_values(schema: dict[str, Any]) -> None:
    functions = [Function(name="f", parameters=schema)]
    parser = FORMATS["qwen_coder"].parser(tools=True, thinking=False, functions=functions)
    text = "<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>"
    deltas = [*parser.push(text), *parser.finish()]
    arguments = (delta.arguments for delta in deltas if isinstance(delta, ToolCallDelta))
    assert "".join(arguments) == '{"a": 5}'


def test_long_replies_are_read_in_linear_time() -> None:
    rng = random.Random(5)
    words = "".join(rng.choice(["so ", "on ", "< ", "and\n"]) for _ in range(50_000))
    assert read(FORMATS["hermes"], *words) == Reply(words, "", ())
