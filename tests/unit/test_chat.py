"""How a chat request becomes a prompt with rules, and generated text OpenAI's deltas."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.chat.rendering import ChatPrompt, ChatRenderer, ChatReply
from serving.chat.template import ChatTemplate
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest
from serving.protocol.responses import Choice

USER = {"role": "user", "content": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
HERMES = (
    '{% if tools %}<tool_call>{"name": <n>, "arguments": <a>}</tool_call>'
    "{{ tools | map(attribute='function.name') | join(',') }}{% endif %}" + TURNS
)
THINKER = HERMES + "<think>\n{% if enable_thinking is false %}</think>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TURNS


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [tool("look"), tool("walk")]


def prepare(source: str, *messages: dict[str, Any], **fields: Any) -> ChatPrompt:
    template = ChatTemplate(source, bos_text="", eos_text="", tokenizer_adds_bos=False)
    body = {"model": "m", "messages": messages or [USER], **fields}
    request = ChatCompletionRequest.parse(json.dumps(body).encode())
    return ChatRenderer(template, lambda _: None).prepare(request)


@pytest.mark.parametrize(
    ("fields", "shown", "constrained"),
    [
        ({}, "look,walk", False),
        ({"tool_choice": "none"}, "", False),
        ({"tool_choice": "required"}, "look,walk", True),
        ({"tool_choice": tool("walk")}, "look,walk", True),
        ({"parallel_tool_calls": False}, "look,walk", True),
        ({"tools": [tool("look", strict=True)]}, "look", True),
        ({"tools": []}, "", False),
    ],
)
def test_tools_are_shown_and_calls_constrained_as_asked(
    fields: dict[str, Any], shown: str, constrained: bool
) -> None:
    prompt = prepare(HERMES, **({"tools": TOOLS} | fields))
    opening = '<tool_call>{"name": <n>, "arguments": <a>}</tool_call>' if shown else ""
    assert prompt.text == f"{opening}{shown}[user]hi"
    assert (prompt.constraint is not None) == constrained
    if prompt.constraint is not None:
        assert (prompt.constraint.kind, prompt.constraint.param) == ("lark", "tools")


def test_a_choice_among_allowed_tools_shows_no_others() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("walk")]}}
    text = prepare(HERMES, tools=TOOLS, tool_choice=choice).text
    assert "walk" in text
    assert "look" not in text


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_form_for_the_answer_beside_tools(choice: str) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "response_format": {"type": "json_object"}}
    if choice == "auto":
        with pytest.raises(ApiError, match="tool_choice") as caught:
            prepare(HERMES, **fields)
        assert caught.value.param == "response_format"
        return
    constraint = prepare(HERMES, **fields).constraint
    assert constraint is not None
    assert constraint.param == ("tools" if choice == "required" else "response_format")


def test_a_template_that_knows_no_tools_is_told_in_the_system_message() -> None:
    text = prepare(TURNS, {"role": "developer", "content": "Be brief."}, USER, tools=TOOLS).text
    assert text.startswith("[system]Be brief.\n\n")
    assert '"look"' in text
    assert text.endswith("[user]hi")
    assert prepare(TURNS, tools=TOOLS).text.startswith("[system]")
    assert prepare(TURNS).text == "[user]hi"


def test_a_template_without_system_messages_is_told_in_the_first() -> None:
    text = prepare(NO_SYSTEM, tools=TOOLS).text
    assert text.startswith("[user]hi\n\n")
    assert '"look"' in text


def test_a_template_that_knows_no_tools_reads_calls_and_results_as_text() -> None:
    said = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "water"}
    text = prepare(TURNS, USER, said, result, result, {"role": "user", "content": "So?"}).text
    call = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
    answer = "<tool_response>\nwater\n</tool_response>"
    assert text == (f"[user]hi[assistant]Let me see.\n{call}\n{call}[user]{answer}\n{answer}\nSo?")


def test_a_prompt_that_opens_a_reasoning_block_is_noticed() -> None:
    assert prepare(THINKER).thinking
    assert not prepare(THINKER, reasoning_effort="none").thinking
    assert not prepare(HERMES).thinking


def deltas(reply: ChatReply, *pieces: str) -> list[dict[str, Any]]:
    return [delta for delta in (*map(reply.push, pieces), reply.finish("stop")) if delta]


def test_text_becomes_deltas_and_deltas_a_message() -> None:
    reply = prepare(THINKER, tools=TOOLS).reply()
    calls = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>\n'
    parts = deltas(reply, "h", "m</think>", "I lo", "ok.\n", calls[:47], calls[47:], calls)
    assert parts[0] == {"reasoning_content": "h"}
    ids = [call["id"] for part in parts for call in part.get("tool_calls", ()) if "id" in call]
    assert len(set(ids)) == 2
    choice = Choice(0)
    for part in parts:
        choice.add(part)
    message = choice.message
    assert message["reasoning_content"] == "hm"
    assert message["content"].strip() == "I look."
    assert [call["function"] for call in message["tool_calls"]] == [CALL["function"]] * 2
    assert reply.reason("stop") == "tool_calls"
    assert reply.reason("length") == "length"


def test_without_tools_calls_are_text() -> None:
    text = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
    reply = prepare(HERMES).reply()
    assert "".join(delta["content"] for delta in deltas(reply, text[:20], text[20:])) == text
    assert reply.reason("stop") == "stop"


def test_an_empty_answer_is_an_empty_text() -> None:
    assert Choice(0).message == {"role": "assistant", "content": "", "refusal": None}
