"""Tools with the real model, as the OpenAI SDK sees them. It is too small to call any unless it must."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.processes import EngineServer

ASK: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "London", "São Paulo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SUM = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3}},
    "required": ["numbers"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": PLACE, "add_up": SUM}
TOOLS: Any = [
    {
        "type": "function",
        "function": {"name": name, "description": f"Use it to {name}.", "parameters": schema},
    }
    for name, schema in SCHEMAS.items()
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def chat(engine: EngineServer, **options: Any) -> Any:
    fields: dict[str, Any] = {"messages": ASK, "tools": TOOLS, "max_tokens": 160, "seed": 5}
    return engine.client.chat.completions.create(model="smol", **(fields | options))


def check(call: Any) -> None:
    assert call.id.startswith("call_")
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_made_and_valid(engine: EngineServer, seed: int) -> None:
    choice = chat(engine, tool_choice="required", seed=seed, parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert len(choice.message.tool_calls) == 1
    check(choice.message.tool_calls[0])


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_a_named_function_is_called_once(engine: EngineServer, name: str) -> None:
    choice = chat(engine, tool_choice=named(name)).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == [name]
    check(choice.message.tool_calls[0])


def test_only_allowed_tools_are_called(engine: EngineServer) -> None:
    tools = {"mode": "required", "tools": [named("add_up")]}
    choice = chat(
        engine,
        tool_choice={"type": "allowed_tools", "allowed_tools": tools},
        parallel_tool_calls=False,
    ).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["add_up"]


def test_every_choice_has_calls_of_its_own(engine: EngineServer) -> None:
    answer = chat(engine, tool_choice="required", n=3, parallel_tool_calls=False)
    calls = [choice.message.tool_calls[0] for choice in answer.choices]
    assert len({call.id for call in calls}) == 3
    for call in calls:
        check(call)


def test_a_stream_says_what_the_whole_answer_says(engine: EngineServer) -> None:
    options: Any = {"tool_choice": named("get_weather"), "temperature": 0}
    chat(engine, **options)  # the prompt is in the cache from now on
    whole = chat(engine, **options).choices[0].message.tool_calls[0].function
    chunks = [chunk.choices[0] for chunk in chat(engine, stream=True, **options)]
    assert chunks[0].delta.role == "assistant"
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    first, *rest = calls
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.id.startswith("call_")
    assert len(rest) > 1, "arguments stream as they are made"
    assert all(call.id is None and call.function.name is None for call in rest)
    assert "".join(call.function.arguments for call in calls) == whole.arguments


def test_the_sdks_stream_helper_gathers_the_call(engine: EngineServer) -> None:
    strict: Any = [
        {"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS
    ]
    choice: Any = named("get_weather")
    with engine.client.chat.completions.stream(
        model="smol", messages=ASK, tools=strict, tool_choice=choice, max_tokens=160
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert [event.name for event in done] == ["get_weather"]
    assert final.message.tool_calls is not None
    arguments = final.message.tool_calls[0].function.parsed_arguments
    jsonschema.validate(arguments, PLACE)


def test_results_go_back_into_the_conversation(engine: EngineServer) -> None:
    message = chat(engine, tool_choice=named("get_weather")).choices[0].message
    for turn in (message, message.model_dump()):
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "17 degrees"}
        answer = chat(engine, messages=[*ASK, turn, result], tool_choice="none", max_tokens=16)
        assert answer.choices[0].message.content
        assert answer.choices[0].message.tool_calls is None
        # The calls and their results are part of what the model reads.
        bare = chat(engine, messages=ASK, tool_choice="none", max_tokens=1)
        assert answer.usage.prompt_tokens > bare.usage.prompt_tokens + 20


def test_tools_are_shown_unless_there_is_no_choice(engine: EngineServer) -> None:
    def prompt_tokens(**options: Any) -> int:
        tokens: int = chat(engine, max_tokens=1, **options).usage.prompt_tokens
        return tokens

    without = prompt_tokens(tools=None)
    assert prompt_tokens(tool_choice="none") == without
    assert prompt_tokens() > without + 50


def test_free_to_choose_the_answer_is_text_or_valid_calls(engine: EngineServer) -> None:
    choice = chat(engine, max_tokens=40).choices[0]
    assert choice.message.content or choice.message.tool_calls


def test_log_probabilities_come_with_calls(engine: EngineServer) -> None:
    options: Any = {"tool_choice": named("get_weather"), "logprobs": True, "temperature": 0}
    answer = chat(engine, **options)
    tokens = answer.choices[0].logprobs.content
    streamed = [
        token.token
        for chunk in chat(engine, stream=True, **options)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert [token.token for token in tokens] == streamed
    # All but the token that ends the answer.
    assert len(tokens) >= answer.usage.completion_tokens - 1


def test_a_schema_that_cannot_be_enforced_is_refused(engine: EngineServer) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "contentEncoding": 5}}}
    odd["properties"]["a"] = {"$ref": "https://example.org/elsewhere"}  # type: ignore[index]
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    with pytest.raises(openai.BadRequestError) as caught:
        chat(engine, tools=tools, tool_choice="required")
    assert caught.value.param is not None
    assert "tools" in caught.value.param


def test_effort_means_nothing_to_this_model(engine: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(engine, tools=None, reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"
