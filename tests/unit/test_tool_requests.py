"""Tools, reasoning and their messages in a request: honoured, or refused with a 400 that names the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def tool(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


TOOLS = [tool("look"), tool("walk")]


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": list(map(tool, names))},
    }


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.parse(json.dumps(HELLO | fields).encode())


@pytest.mark.parametrize(
    ("fields", "names", "required", "parallel"),
    [
        ({}, ["look", "walk"], False, True),
        ({"tool_choice": "auto"}, ["look", "walk"], False, True),
        ({"tool_choice": "required"}, ["look", "walk"], True, True),
        ({"parallel_tool_calls": False}, ["look", "walk"], False, False),
        ({"tool_choice": tool("walk")}, ["walk"], True, False),
        ({"tool_choice": allowed("auto", "walk")}, ["walk"], False, True),
        ({"tool_choice": allowed("required", "walk", "look")}, ["look", "walk"], True, True),
    ],
)
def test_what_may_be_called(
    fields: dict[str, Any], names: list[str], required: bool, parallel: bool
) -> None:
    use = chat(tools=TOOLS, **fields).tool_use
    assert use is not None
    assert [function.name for function in use.functions] == names
    assert (use.required, use.parallel) == (required, parallel)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": None},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "none"},
    ],
)
def test_nothing_may_be_called(fields: dict[str, Any]) -> None:
    assert chat(**fields).tool_use is None


def messages(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool("two words")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("x", parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("x", mood=1)]}, "tools[0].function.mood"),
        ({"tools": [*TOOLS, tool("look")]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": tool("fly")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "fly")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice.allowed_tools.tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": tool("look")}, "tool_choice"),
        ({"functions": [{"name": "look"}]}, "functions"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs"),
        (messages({"role": "tool", "content": "5"}), "messages[0].tool_call_id"),
        (
            messages({"role": "user", "content": "5", "tool_call_id": "x"}),
            "messages[0].tool_call_id",
        ),
        (messages({"role": "tool", "tool_call_id": "x"}), "messages[0].content"),
        (messages({"role": "assistant", "content": None}), "messages[0].content"),
        (
            messages({"role": "user", "content": "a", "tool_calls": [CALL]}),
            "messages[0].tool_calls",
        ),
        (
            messages({"role": "user", "content": "a", "reasoning_content": "b"}),
            "messages[0].reasoning_content",
        ),
        (
            messages({"role": "assistant", "tool_calls": [CALL | {"type": "custom"}]}),
            "messages[0].tool_calls[0].type",
        ),
        (
            messages({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "x"}}]}),
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert param in caught.value.message


def test_a_conversation_with_calls_passes_the_gateway_unchanged() -> None:
    schema = {"type": "object", "properties": {"to": {"enum": [None, "sea"], "default": None}}}
    request = chat(
        messages=[
            {"role": "user", "content": "look"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [CALL],
                "reasoning_content": "hm",
                "refusal": None,
                "annotations": [],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": "water"},
        ],
        tools=[tool("look", description="d", parameters=schema, strict=True)],
        tool_choice=tool("look"),
        reasoning_effort="low",
        chat_template_kwargs={"enable_thinking": None},
    )
    sent = request.model_dump(exclude_none=True, by_alias=True)
    assert sent["tools"][0]["function"]["parameters"] == schema
    assert sent["chat_template_kwargs"] == {"enable_thinking": None}
    assert ChatCompletionRequest.parse(json.dumps(sent).encode()) == request
