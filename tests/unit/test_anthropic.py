"""Anthropic's Messages API: what a request becomes, and what a chat completion's answer does."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from anthropic import types
from anthropic.types import Message, RawMessageStreamEvent, message_create_params
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_message_create_params
from pydantic import BaseModel, TypeAdapter

from serving.protocol.anthropic import (
    CountTokensRequest,
    MessagesRequest,
    MessageTranslation,
    blocks,
    error_json,
    request,
)
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, RefusingBody, validated

STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
HELLO: dict[str, Any] = {
    "model": "m",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
}
TOOL: dict[str, Any] = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL: dict[str, Any] = {
    "type": "tool_use",
    "id": "toolu_1",
    "name": "weather",
    "input": {"city": "Paris"},
}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "toolu_1"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return validated(MessagesRequest, HELLO | fields).chat


def messages(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    """The chat's messages that turns become."""
    request = chat(messages=[{"role": role, "content": content} for role, content in turns])
    return [message.model_dump(exclude_none=True) for message in request.messages]


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def known(body: type[BaseModel]) -> set[str]:
    names = {field.alias or name for name, field in body.model_fields.items()}
    return names | set(body.refused if issubclass(body, RefusingBody) else ())


def declared(*theirs: Any) -> set[str]:
    return set().union(*(each.__annotations__ for each in theirs))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            MessagesRequest,
            declared(
                message_create_params.MessageCreateParamsBase,
                message_create_params.MessageCreateParamsStreaming,
                beta_message_create_params.MessageCreateParamsBase,
            )
            - {"betas"},  # a header
        ),
        (
            CountTokensRequest,
            declared(
                types.MessageCountTokensParams, beta_count_tokens_params.MessageCountTokensParams
            )
            - {"betas"},
        ),
        (blocks.Turn, declared(*get_args(types.MessageParam))),
        (blocks.TextBlock, declared(types.TextBlockParam)),
        (blocks.ImageBlock, declared(types.ImageBlockParam)),
        (blocks.Base64Source, declared(types.Base64ImageSourceParam)),
        (blocks.ThinkingBlock, declared(types.ThinkingBlockParam)),
        (blocks.ToolUseBlock, declared(types.ToolUseBlockParam)),
        (blocks.ToolResultBlock, declared(types.ToolResultBlockParam)),
        (blocks.CacheControl, declared(types.CacheControlEphemeralParam)),
        (request.Tool, declared(types.ToolParam)),
        (
            request.ToolChoice,
            declared(
                types.ToolChoiceAnyParam,
                types.ToolChoiceAutoParam,
                types.ToolChoiceNoneParam,
                types.ToolChoiceToolParam,
            ),
        ),
        (request.ThinkingEnabled, declared(types.ThinkingConfigEnabledParam)),
        (request.ThinkingAdaptive, declared(types.ThinkingConfigAdaptiveParam)),
        (request.ThinkingDisabled, declared(types.ThinkingConfigDisabledParam)),
        (request.OutputConfig, declared(types.OutputConfigParam)),
        (request.OutputFormat, declared(types.JSONOutputFormatParam)),
        (request.Metadata, declared(types.MetadataParam)),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_every_field_of_anthropics_is_known(ours: type[BaseModel], theirs: set[str]) -> None:
    assert theirs
    assert theirs - known(ours) == set()


@pytest.mark.parametrize("name", sorted(MessagesRequest.refused))
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    error = refused(**{name: {"some": "thing"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert MessagesRequest.refused[name].reason in error.message


def test_fields_are_read() -> None:
    request = chat(
        system="Be brief.",
        stop_sequences=["END"],
        temperature=1,
        top_p=0.5,
        top_k=7,
        stream=True,
        metadata={"user_id": "ann"},
        service_tier="auto",
    )
    assert request.messages[0].role == "system"
    assert request.messages[0].text == "Be brief."
    assert (request.token_limit, request.stop_strings) == (9, ("END",))
    assert (request.temperature, request.top_p, request.top_k) == (1.0, 0.5, 7)
    assert (request.stream, request.user) == (True, "ann")


def test_a_conversation_with_a_tool_becomes_a_chats() -> None:
    assert messages(
        ("user", [text("Weather?"), text("In Paris.")]),
        (
            "assistant",
            [{"type": "thinking", "thinking": "Ask.", "signature": ""}, text("Wait."), CALL],
        ),
        ("user", [RESULT | {"content": [text("17"), text("degrees")]}, text("Well?")]),
    ) == [
        {"role": "user", "content": "Weather?\nIn Paris."},
        {
            "role": "assistant",
            "content": "Wait.",
            "reasoning_content": "Ask.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
                }
            ],
        },
        {"role": "tool", "content": "17\ndegrees", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "Well?"},
    ]


def test_turns_in_a_row_are_one() -> None:
    turns = messages(("user", "a"), ("user", [text("b")]), ("assistant", []), ("user", "c"))
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "a\nb"),
        ("assistant", ""),
        ("user", "c"),
    ]


def test_a_system_prompt_in_blocks_and_one_in_the_conversation() -> None:
    blocks = [text("a") | {"cache_control": {"type": "ephemeral", "ttl": "1h"}}, text("b")]
    turns: Any = [{"role": "system", "content": "c"}, {"role": "user", "content": "hi"}]
    request = chat(system=blocks, messages=turns, cache_control={"type": "ephemeral"})
    assert [(m.role, m.text) for m in request.messages] == [("system", "a\nb\nc"), ("user", "hi")]


def test_images_become_data_urls_in_their_places() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    [turn] = messages(
        ("user", [text("a"), text("b"), {"type": "image", "source": source}, text("c")])
    )
    assert turn["content"] == [
        {"type": "text", "text": "a\nb"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "c"},
    ]


def test_images_in_results_follow_them_as_the_users() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    image = {"type": "image", "source": source}
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    calls = [CALL, CALL | {"id": "toolu_2"}]
    results = [
        RESULT | {"content": [text("a map"), image]},
        RESULT | {"tool_use_id": "toolu_2", "content": [image]},
    ]
    told = [
        {"role": "tool", "content": "a map", "tool_call_id": "toolu_1"},
        {"role": "tool", "content": "", "tool_call_id": "toolu_2"},
    ]
    before = (("user", "hi"), ("assistant", calls))
    assert messages(*before, ("user", results))[2:] == [
        *told,
        {"role": "user", "content": [part, part]},
    ]
    assert messages(*before, ("user", [*results, text("So?")]), ("user", "Well?"))[2:] == [
        *told,
        {"role": "user", "content": [part, part, {"type": "text", "text": "So?\nWell?"}]},
    ]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (RESULT, ""),
        (RESULT | {"content": "17"}, "17"),
        (RESULT | {"content": "no such city", "is_error": True}, "Error: no such city"),
    ],
)
def test_results_of_tools(result: dict[str, Any], told: str) -> None:
    turns = messages(("user", "hi"), ("assistant", [CALL]), ("user", [result]))
    assert turns[-1] == {"role": "tool", "content": told, "tool_call_id": "toolu_1"}


def test_tools_and_choices() -> None:
    tool = TOOL | {"description": "Tells it.", "strict": True, "type": "custom"}
    function = {
        "name": "weather",
        "description": "Tells it.",
        "parameters": TOOL["input_schema"],
        "strict": True,
    }
    request = chat(tools=[tool], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert request.tools is not None
    assert request.tools[0].function.model_dump() == function
    assert (request.tool_choice, request.parallel_tool_calls) == ("auto", False)
    for choice, required, named in (("any", True, False), ("tool", True, True)):
        name = {"name": "weather"} if named else {}
        use = chat(tools=[tool], tool_choice={"type": choice, **name}).tool_use
        assert use is not None
        assert (use.required, use.parallel) == (required, not named)
    assert chat(tools=[tool], tool_choice={"type": "none"}).tool_use is None


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 32_000}}, "high"),
        (
            {
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "output_config": {"effort": "max"},
            },
            "max",
        ),
        ({"output_config": {"effort": "low"}}, "low"),
    ],
)
def test_thinking_is_an_effort(fields: dict[str, Any], effort: str | None) -> None:
    assert chat(**fields).reasoning_effort == effort


def test_an_output_format_is_enforced() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    constraint = chat(
        output_config={"format": {"type": "json_schema", "schema": schema}}
    ).constraint
    assert constraint is not None
    assert json.loads(constraint.source) == schema


@pytest.mark.parametrize(
    "fields",
    [
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"mcp_servers": []},
        {"container": None},
        {"diagnostics": None},
        {"inference_geo": None},
        {"speed": "standard"},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields) == chat()


def with_block(block: dict[str, Any], role: str = "user") -> dict[str, Any]:
    last = [{"role": "user", "content": "go on"}] if role == "assistant" else []
    return {"messages": [{"role": role, "content": [block]}, *last]}


def with_tool(**fields: Any) -> dict[str, Any]:
    return {"tools": [TOOL | fields]}


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"max_tokens": None}, "max_tokens", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater"),
        ({"temperature": 1.5}, "temperature", "less than or equal to 1"),
        ({"temperature": float("nan")}, "temperature", ""),
        ({"top_k": -1}, "top_k", ""),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences", "at most 4"),
        ({"stop_sequences": [""]}, "stop_sequences[0]", ""),
        ({"messages": []}, "messages", ""),
        ({"messages": "hi"}, "messages", ""),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "needs content"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role", "'user'"),
        (
            {"messages": [{"role": "assistant", "content": "The answer is ("}]},
            "messages[0].role",
            "last turn is the user's",
        ),
        ({"user": "ann"}, "user", "Unknown"),
        ({"n": 2}, "n", "Unknown"),
        ({"metadata": {"color": "red"}}, "metadata.color", "Unknown"),
        ({"service_tier": "priority"}, "service_tier", "'standard_only'"),
        ({"speed": "fast"}, "speed", "as fast as"),
        ({"container": "c"}, "container", "runs code"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers", "MCP"),
        ({"output_format": {}}, "output_format", "output_config.format"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 10}},
            "thinking.budget_tokens",
            "1024",
        ),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking.display", "hides"),
        ({"thinking": {"type": "between_tools"}}, "thinking", "'adaptive'"),
        (with_tool(type="web_search_20250305"), "tools[0].type", "'web_search_20250305'"),
        (with_tool(defer_loading=True), "tools[0].defer_loading", "sees all"),
        (with_tool(name="a b"), "tools[0].name", "pattern"),
        (with_tool(input_schema={"type": "string"}), "tools[0].input_schema", "'object'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "'tools' has none"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name", "needed"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}},
            "tool_choice",
            "names 'x'",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "same name"),
        (
            with_block({"type": "image", "source": {"type": "url", "url": "http://x"}}),
            "messages[0].content[0].source.type",
            "not fetched",
        ),
        (
            with_block({"type": "document", "source": {}}),
            "messages[0].content[0]",
            "no documents",
        ),
        (
            with_block({"type": "redacted_thinking", "data": "x"}, "assistant"),
            "messages[0].content[0]",
            "encrypted",
        ),
        (with_block(CALL), "messages[0].content[0].type", "role 'user' cannot hold"),
        (with_block(RESULT), "messages[0].content[0].tool_use_id", "no call"),
        (
            with_block(text("a") | {"citations": [{}]}),
            "messages[0].content[0].citations",
            "cite nothing",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": [CALL, CALL]},
                    {"role": "user", "content": "hi"},
                ]
            },
            "messages[1].content[1].id",
            "another call's",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [CALL]},
                    {"role": "user", "content": [RESULT, RESULT]},
                ]
            },
            "messages[1].content[1].tool_use_id",
            "another result",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [CALL]},
                    {
                        "role": "user",
                        "content": [
                            RESULT | {"content": [{"type": "document", "source": {"type": "text"}}]}
                        ],
                    },
                ]
            },
            "messages[1].content[0].content[0]",
            "no documents",
        ),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], param: str, why: str) -> None:
    error = refused(**fields)
    assert error.param == param
    assert param in error.message
    assert why in error.message


def test_what_is_counted_is_what_a_message_would_read() -> None:
    fields: dict[str, Any] = {
        "model": "m",
        "system": "Be brief.",
        "messages": HELLO["messages"],
        "tools": [TOOL],
    }
    counted = validated(CountTokensRequest, fields).tokenization
    assert counted.messages == chat(**fields).messages
    assert counted.tools == chat(**fields).tools
    fields["tool_choice"] = {"type": "none"}
    assert validated(CountTokensRequest, fields).tokenization.tools is None


USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 9,
    "total_tokens": 21,
    "prompt_tokens_details": {"cached_tokens": 8},
}
CHAT_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def answer(message: dict[str, Any], finish_reason: str = "stop", **more: Any) -> Message:
    """What an answer becomes, as the SDK reads it."""
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, **more}
    completion = {"id": "c", "model": "m", "choices": [choice], "usage": USAGE}
    body = MessageTranslation(chat(), "req").answer(completion)
    return Message.model_validate_json(json.dumps(body), strict=True)


def test_an_answer_is_a_message() -> None:
    message = answer({"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."})
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "m")
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 8, 9)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"city": "Paris"}', {"city": "Paris"}),
        ("", {}),
        ('{"city": "Par', {"INVALID_JSON": '{"city": "Par'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('{"a": %s}' % ("9" * 30), {"a": 1e30}),
    ],
)
def test_calls_are_blocks_with_their_input(arguments: str, given: dict[str, Any]) -> None:
    call = CHAT_CALL | {"function": {"name": "weather", "arguments": arguments}}
    message = answer({"content": None, "tool_calls": [call]}, "tool_calls")
    [block] = [block.to_dict() for block in message.content]
    assert block == {"type": "tool_use", "id": "call_1", "name": "weather", "input": given}
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    ("limit", "choice", "reason", "sequence"),
    [
        (9, {"finish_reason": "length"}, "max_tokens", None),
        (10, {"finish_reason": "length"}, "model_context_window_exceeded", None),
        (9, {"finish_reason": "stop", "stop_reason": None}, "end_turn", None),
        (9, {"finish_reason": "stop", "stop_reason": "END"}, "stop_sequence", "END"),
        # vLLM tells a stop token's number in the same place.
        (9, {"finish_reason": "stop", "stop_reason": 2}, "end_turn", None),
        (9, {"finish_reason": "content_filter"}, "refusal", None),
    ],
)
def test_stop_reasons(
    limit: int, choice: dict[str, Any], reason: str, sequence: str | None
) -> None:
    translation = MessageTranslation(chat(max_tokens=limit, stop_sequences=["END"]), "req")
    completion = {
        "model": "m",
        "choices": [{"message": {"content": "a"}, **choice}],
        "usage": USAGE,
    }
    told = translation.answer(completion)
    assert (told["stop_reason"], told["stop_sequence"]) == (reason, sequence)


def events(data: bytes) -> list[dict[str, Any]]:
    """The payloads of events, whose names are their types and which the SDK knows."""
    payloads = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, payload = event.partition("\ndata: ")
        payloads.append(json.loads(payload))
        assert name == f"event: {payloads[-1]['type']}"
        if payloads[-1]["type"] != "error":
            STREAM_EVENT.validate_json(payload, strict=True)
    return payloads


def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def stream(*deltas: dict[str, Any]) -> list[dict[str, Any]]:
    translation = MessageTranslation(chat(), "req")
    data = b"".join(translation.chunk(chunk(delta)) for delta in deltas)
    data += translation.chunk(chunk({}, "tool_calls"))
    data += translation.chunk({"model": "m", "choices": [], "usage": USAGE})
    return events(data + translation.end())


def test_a_stream_opens_one_block_after_the_other() -> None:
    second = CHAT_CALL | {"id": "call_2", "index": 1}
    told = stream(
        {"role": "assistant", "content": "", "refusal": None},
        {"reasoning_content": "H"},
        {"reasoning_content": "m."},
        {"content": "Wait", "tool_calls": [CHAT_CALL | {"index": 0}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": " "}}, second]},
        {"content": "Done.", "tool_calls": [{"index": 1, "function": {"arguments": " "}}]},
    )
    assert told[0]["type"] == "message_start"
    assert told[0]["message"]["content"] == []
    assert [
        (
            event["type"].removeprefix("content_block_"),
            event["index"],
            *list((event.get("delta") or event.get("content_block") or {}).values())[:2],
        )
        for event in told[1:-2]
    ] == [
        ("start", 0, "thinking", ""),
        ("delta", 0, "thinking_delta", "H"),
        ("delta", 0, "thinking_delta", "m."),
        ("stop", 0),
        ("start", 1, "text", ""),
        ("delta", 1, "text_delta", "Wait"),
        ("stop", 1),
        ("start", 2, "tool_use", "call_1"),
        ("delta", 2, "input_json_delta", "{}"),
        ("delta", 2, "input_json_delta", " "),
        ("stop", 2),
        ("start", 3, "tool_use", "call_2"),
        ("delta", 3, "input_json_delta", "{}"),
        ("delta", 3, "input_json_delta", " "),
        ("stop", 3),
        ("start", 4, "text", ""),
        ("delta", 4, "text_delta", "Done."),
        ("stop", 4),
    ]
    assert told[-2] == {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 8,
            "output_tokens": 9,
        },
    }
    assert told[-1] == {"type": "message_stop"}


def test_a_call_may_begin_and_go_on_in_one_delta() -> None:
    more = {"index": 0, "function": {"arguments": " "}}
    told = stream({"tool_calls": [CHAT_CALL | {"index": 0}, more]})
    assert [event["delta"]["partial_json"] for event in told[2:4]] == ["{}", " "]


def test_a_stream_of_nothing_is_an_empty_message() -> None:
    kinds = [event["type"] for event in stream({"role": "assistant", "content": ""})]
    assert kinds == ["message_start", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"type": "api_error", "code": "engine_stopped"}, "overloaded_error"),
        ({"type": "api_error", "code": "remote_broke_off"}, "overloaded_error"),
        ({"type": "invalid_request_error", "code": "invalid_value"}, "invalid_request_error"),
        ({"type": "BadGateway"}, "api_error"),
    ],
)
def test_an_error_in_a_stream(error: dict[str, Any], kind: str) -> None:
    translation = MessageTranslation(chat(), "req")
    translation.chunk(chunk({"content": "a"}))
    [told] = events(translation.failure({"error": {"message": "Oh.", **error}}))
    assert told == {
        "type": "error",
        "error": {"type": kind, "message": "Oh."},
        "request_id": "req",
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_errors_have_anthropics_names(status: int, kind: str) -> None:
    told = error_json(status, {"message": "Oh.", "code": None}, "req")
    assert told["error"] == {"type": kind, "message": "Oh."}


def test_errors_speak_of_anthropics_fields() -> None:
    translation = MessageTranslation(chat(), "req")
    message = "'reasoning_effort' means nothing to this model's chat template; leave it out."
    told = translation.refusal(400, {"error": {"message": message, "code": "unsupported"}})
    assert told["error"]["message"].startswith("'thinking' (or 'output_config.effort') means")
    long = {"message": "It has 600 tokens.", "code": "context_length_exceeded"}
    told = translation.refusal(400, {"error": long})
    assert told["error"]["message"] == "prompt is too long: It has 600 tokens."
