"""Chat templates are rendered as their models expect, and cannot do harm."""

from __future__ import annotations

import time
from typing import Any

import pytest

from serving.chat import template as chat_template
from serving.chat.template import ChatTemplate
from serving.protocol.errors import ApiError
from serving.protocol.requests import Function, FunctionCall, Message, ToolCall

LOOK = Function(name="look", description="See <it>", strict=True)


def conversation(arguments: str = '{"at": "sea"}', reasoning: str | None = None) -> list[Message]:
    """A user's question, a call and its result."""
    call = ToolCall(id="call_abc123def456", function=FunctionCall(name="look", arguments=arguments))
    return [
        Message(role="user", content="hi"),
        Message(role="assistant", tool_calls=[call], reasoning_content=reasoning),
        Message(role="tool", tool_call_id=call.id, content="water"),
    ]


def render(source: str | None, *messages: Message, adds_bos: bool = False, **options: Any) -> str:
    template = ChatTemplate(source, bos_text="<s>", eos_text="</s>", tokenizer_adds_bos=adds_bos)
    return template.render(messages or (Message(role="user", content="hi"),), **options)


def test_turns_and_helpers() -> None:
    source = (
        "{%- for m in messages %}[{{ m.role }}|{{ m.content | tojson }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant|{% endif %}"
    )
    text = render(
        source, Message(role="developer", content="be <kind>"), Message(role="user", content="é")
    )
    assert text == '[system|"be <kind>"][user|"é"][assistant|'


def test_bos_is_not_doubled() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    assert render(source, adds_bos=True) == "hi"
    assert render(source, adds_bos=False) == "<s>hi"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "refuses"),
        ("{% for %}", "broken"),
        (None, "no chat template"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_fails_is_a_400(source: str | None, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        render(source)
    assert caught.value.status == 400


TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.tool_calls %}"
CALLS = "{% for c in m.tool_calls %}CALL{% endfor %}{% endif %};{% endfor %}"


@pytest.mark.parametrize(
    ("call", "rendered"),
    [
        ("{{ c.function.arguments | tojson }}", '{"at": "sea"}'),
        ("{{ '' + c.function.arguments }}", '{"at": "sea"}'),
        ("{{ c.function.arguments }}", '{"at": "sea"}'),
        ("{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}", "<at>sea"),
    ],
)
def test_arguments_come_as_the_template_wants_them(call: str, rendered: str) -> None:
    text = render(TURNS + CALLS.replace("CALL", call), *conversation())
    assert text == f"user:hi;assistant:{rendered};tool:water;"


def test_arguments_that_are_no_json_are_shown_as_they_are() -> None:
    source = TURNS + CALLS.replace("CALL", "{{ c.function.arguments }}")
    assert "{oops;tool" in render(source, *conversation("{oops"))


def test_a_call_without_text_has_the_content_the_template_expects() -> None:
    asks = "{% for m in messages %}{% if m.content is none %}C{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }};{% endif %}{% endfor %}"
    assert render(asks, *conversation()) == 'hi;C{"at": "sea"}water;'


def test_call_ids_fit_templates_that_want_nine_characters() -> None:
    strict = "{% if (c.id | length) != 9 %}{{ raise_exception('id') }}{% endif %}"
    source = TURNS + CALLS.replace("CALL", strict + "{{ c.function.arguments | tojson }}{{ c.id }}")
    assert "123def456;" in render(source, *conversation())
    result_id = "{{ messages[-1].tool_call_id }}"
    assert render(source + result_id, *conversation()).endswith(";123def456")


def test_a_result_carries_the_name_of_its_function() -> None:
    assert render("{{ messages[-1].name }}", *conversation()) == "look"


def test_tools_reach_the_template_without_what_is_not_for_the_model() -> None:
    assert render("{{ tools | tojson }}", functions=[LOOK]) == (
        '[{"type": "function", "function": {"name": "look", "description": "See <it>", '
        '"parameters": {"type": "object", "properties": {}}}}]'
    )
    assert render("{{ tools is none }}") == "True"


def test_templates_that_loop_over_content_get_parts() -> None:
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert render(source, Message(role="user", content="hello")) == "hello"


def test_earlier_reasoning_is_shown_under_both_its_names() -> None:
    source = "{{ messages[1].reasoning_content }}{{ messages[1].thinking }}"
    assert render(source, *conversation(reasoning="hm")) == "hmhm"


@pytest.mark.parametrize(
    ("source", "effort", "rendered"),
    [
        ("{{ reasoning_effort }}", "low", "low"),
        ("{{ reasoning_effort }}", "none", "none"),
        ("{{ enable_thinking }}", "none", "False"),
        ("{{ enable_thinking }}", "high", "True"),
        ("{{ thinking }}{{ reasoning_effort }}", "none", "False"),
        ("{{ thinking }}{{ reasoning_effort }}", "high", "Truehigh"),
        ("{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
         "{{ reasoning_effort }}", "low", "low"),
    ],
)  # fmt: skip
def test_effort_is_told_in_the_templates_words(source: str, effort: str, rendered: str) -> None:
    assert render(source, reasoning_effort=effort) == rendered


def test_variables_reach_the_template() -> None:
    source = "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    assert render(source, variables={"enable_thinking": False}) == "False"
    both = render(source, variables={"enable_thinking": False}, reasoning_effort="high")
    assert both == "False"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"variables": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"variables": {"messages": []}}, "chat_template_kwargs.messages"),
    ],
)
def test_what_means_nothing_to_the_template_is_refused(options: Any, param: str) -> None:
    with pytest.raises(ApiError, match="means nothing") as caught:
        render("{{ messages[0].content }}", **options)
    assert caught.value.status == 400
    assert caught.value.param == param


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{% for a in range(99999) %}{{ a }}{{ m() }}{% endfor %}{% endmacro %}{{ m() }}",
        "{% for m in messages %}{% set _ = messages.append(m) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_a_400(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MOST_SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(ApiError, match="refuses") as caught:
        render(endless)
    assert caught.value.code == "template_error"
    assert time.monotonic() - started < 5


def test_a_prompt_without_measure_is_a_400(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_MOST_CHARACTERS", 1000)
    with pytest.raises(ApiError, match="1000 characters"):
        render("{% for a in range(9999) %}{{ a }}{% endfor %}")


def test_marks_for_training_are_passed_over() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"
