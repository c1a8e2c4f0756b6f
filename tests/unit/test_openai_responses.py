"""The Responses API in terms of chat completions, without a server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import responses, shared_params
from openai.types.responses import (
    Response,
    ResponseStreamEvent,
    response_create_params,
    response_input_item_param,
    response_reasoning_item_param,
    response_retrieve_params,
)
from openai.types.responses.response_create_params import (
    ResponseCreateParamsBase,
    ResponseCreateParamsStreaming,
)
from openai.types.responses.response_item import ResponseItem

from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import (
    InputItemsQuery,
    Item,
    ResponseRequest,
    ResponseTranslation,
    begun,
    items,
    numbered,
    request,
)
from serving.protocol.requests import (
    ChatCompletionRequest,
    RefusingBody,
    read_object,
    validated,
)

EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
SDK_ITEM: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseItem)
ITEMS: pydantic.TypeAdapter[list[Item]] = pydantic.TypeAdapter(list[Item])
CALL = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "a cat"}
PNG = "data:image/png;base64,AAAA"


def ask(**fields: Any) -> ResponseRequest:
    body = json.dumps({"model": "m", "input": "hi", **fields}).encode()
    return ResponseRequest.of(read_object(body))


def chat(**fields: Any) -> ChatCompletionRequest:
    return ask(**fields).chat([])


def messages(items: list[Any], **fields: Any) -> list[dict[str, Any]]:
    asked = chat(input=items, **fields)
    return [message.model_dump(exclude_none=True) for message in asked.messages]


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def test_every_parameter_of_openais_is_known() -> None:
    known = {*ResponseRequest.model_fields, *ResponseRequest.refused}
    spec = {
        *ResponseCreateParamsBase.__annotations__,
        *ResponseCreateParamsStreaming.__annotations__,
    }
    assert known == spec


@pytest.mark.parametrize("name", sorted(ResponseRequest.refused))
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    refusal = ResponseRequest.refused[name]
    error = refused(**{name: {"some": "thing"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert refusal.reason in error.message
    for nothing in (None, *refusal.nothing):
        chat(**{name: nothing})


def test_settings_become_the_chats() -> None:
    asked = chat(
        instructions="Be brief.",
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.9,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        service_tier="flex",
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        safety_identifier="ann",
    )
    assert [(m.role, m.text) for m in asked.messages] == [("system", "Be brief."), ("user", "hi")]
    assert asked.token_limit == 7
    assert (asked.temperature, asked.top_p) == (0.5, 0.9)
    assert asked.top_logprob_count == 3
    assert asked.priority == "batch"
    assert asked.reasoning_effort == "low"
    assert asked.user == "ann"


def test_forms_and_tools_become_the_chats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    asked = chat(text={"format": form, "verbosity": "medium"})
    assert asked.constraint is not None
    assert json.loads(asked.constraint.source) == schema
    assert chat(text={"format": {"type": "json_object"}}).constraint is not None
    assert chat(text={"format": {"type": "text"}}).constraint is None
    tools = [
        {"type": "function", "name": name, "parameters": schema, "strict": True}
        for name in ("look", "walk")
    ]
    for choice, names, required in (
        (None, ["look", "walk"], False),
        ("required", ["look", "walk"], True),
        ({"type": "function", "name": "walk"}, ["walk"], True),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "look"}],
            },
            ["look"],
            True,
        ),
    ):
        use = chat(tools=tools, tool_choice=choice).tool_use
        assert use is not None
        assert [function.name for function in use.functions] == names
        assert use.required == required
        assert use.functions[0].parameters == schema
        assert use.functions[0].strict


def test_items_become_messages() -> None:
    reasoning = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "hm"}],
    }
    said: dict[str, Any] = {
        "type": "message",
        "id": "msg_1",
        "role": "assistant",
        "status": "completed",
        "phase": None,
        "content": [{"type": "output_text", "text": "wait", "annotations": [], "logprobs": None}],
    }
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    assert messages(
        [
            {"role": "developer", "content": "Look first."},
            {"role": "user", "content": [{"type": "input_text", "text": "What is there?"}]},
            *(reasoning, said, CALL, OUTPUT),
            {"role": "assistant", "content": "A cat."},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No more."}]},
        ]
    ) == [
        {"role": "developer", "content": "Look first."},
        {"role": "user", "content": "What is there?"},
        {
            "role": "assistant",
            "content": "wait",
            "tool_calls": [call],
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "a cat", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "A cat."},
        {"role": "assistant", "content": "No more."},
    ]


def test_a_summary_stands_for_reasoning_that_is_not_there() -> None:
    summary = [{"type": "summary_text", "text": "short"}]
    [message] = messages([{"type": "reasoning", "id": "rs_1", "summary": summary}])
    assert message["reasoning_content"] == "short"


def test_images_are_the_users() -> None:
    image = {"type": "input_image", "image_url": PNG, "detail": "auto"}
    text = {"type": "input_text", "text": "see"}
    [message] = messages([{"role": "user", "content": [text, image]}])
    assert message["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": PNG}},
    ]
    assert refused(input=[{"role": "system", "content": [image]}]).param == "input[0].content"


def test_images_in_outputs_follow_them_as_the_users() -> None:
    image = {"type": "input_image", "image_url": PNG, "detail": "auto"}
    output = OUTPUT | {"output": [{"type": "input_text", "text": "see"}, image]}
    shown = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PNG}}]}
    said = {"role": "tool", "tool_call_id": "call_1", "content": "see"}
    assert messages([CALL, output])[1:] == [said, shown]
    second = {"call_id": "call_2"}
    asked = messages(
        [CALL, CALL | second, output, OUTPUT | second, {"role": "user", "content": "?"}]
    )
    assert asked[1:] == [
        said,
        {"role": "tool", "tool_call_id": "call_2", "content": "a cat"},
        shown,
        {"role": "user", "content": "?"},
    ]
    error = refused(input=[CALL, OUTPUT | {"output": [{"type": "input_file", "file_id": "f"}]}])
    assert error.param == "input[1].output[0]"
    assert "read no files" in error.message


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (items.MessageItem, responses.EasyInputMessageParam),
        (items.MessageItem, response_input_item_param.Message),
        (items.MessageItem, responses.ResponseOutputMessageParam),
        (items.InputText, responses.ResponseInputTextParam),
        (items.InputImage, responses.ResponseInputImageParam),
        (items.OutputText, responses.ResponseOutputTextParam),
        (items.OutputRefusal, responses.ResponseOutputRefusalParam),
        (items.ReasoningItem, responses.ResponseReasoningItemParam),
        (items.SummaryText, response_reasoning_item_param.Summary),
        (items.ReasoningText, response_reasoning_item_param.Content),
        (items.FunctionCallItem, responses.ResponseFunctionToolCallParam),
        (items.FunctionCallOutputItem, response_input_item_param.FunctionCallOutput),
        (request.FunctionTool, responses.FunctionToolParam),
        (request.NamedFunction, responses.ToolChoiceFunctionParam),
        (request.AllowedTools, responses.ToolChoiceAllowedParam),
        (request.TextConfig, responses.ResponseTextConfigParam),
        (request.SchemaFormat, responses.ResponseFormatTextJSONSchemaConfigParam),
        (request.Reasoning, shared_params.Reasoning),
        (request.StreamOptions, response_create_params.StreamOptions),
        (request.RetrieveQuery, response_retrieve_params.ResponseRetrieveParamsStreaming),
        (request.RetrieveQuery, response_retrieve_params.ResponseRetrieveParamsBase),
        (request.InputItemsQuery, responses.InputItemListParams),
    ],
)
def test_every_field_of_the_objects_in_them_is_known(
    ours: type[pydantic.BaseModel], theirs: Any
) -> None:
    names = {field.alias or name for name, field in ours.model_fields.items()}
    names |= set(ours.refused if issubclass(ours, RefusingBody) else ())
    assert theirs.__annotations__
    assert set(theirs.__annotations__) - names == set()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": []}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
         "input[0].content[0].text"),
        ({"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": PNG, "detail": "high"}]}]},
         "input[0].content[0].detail"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
         "input[0].content[0].file_id"),
        ({"input": [{"role": "user", "content": "x", "made_up": 1}]}, "input[0].made_up"),
        ({"input": [{"type": "item_reference", "id": "msg_1", "more": 1}]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}]},
         "input[0].encrypted_content"),
        ({"input": [CALL]}, "input"),
        ({"input": [OUTPUT]}, "input"),
        ({"input": [CALL, CALL, OUTPUT]}, "input"),
        ({"input": [CALL, OUTPUT, OUTPUT]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "defer_loading": True}]},
         "tools[0].defer_loading"),
        ({"tools": [{"type": "function", "name": "a"}] * 2}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation"),
        ({"stream": True, "background": True}, "stream"),
        ({"store": False, "background": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
    ],
)  # fmt: skip
def test_errors_name_the_field(fields: dict[str, Any], param: str) -> None:
    assert refused(**fields).param == param


def test_a_history_can_become_too_long() -> None:
    history = ITEMS.validate_python([{"role": "user", "content": "x"}] * 10_000)
    with pytest.raises(ApiError) as caught:
        ask().chat(history)
    assert (caught.value.status, caught.value.param) == (400, "input")


def test_stored_items_are_what_lists_of_items_hold() -> None:
    items = ITEMS.validate_python(
        [
            {"role": "user", "content": "hi", "id": "same"},
            {"role": "assistant", "content": "yes?", "id": "same"},
            {"role": "user", "content": [{"type": "input_image", "image_url": PNG}], "id": "old"},
            {"type": "reasoning", "summary": []},
            CALL,
            OUTPUT,
        ]
    )
    stored = numbered(items, {"old"})
    for item in stored:
        SDK_ITEM.validate_python(item)
    ids = [item["id"] for item in stored]
    assert ids[0] == "same"
    assert len({*ids, "old"}) == len(items) + 1
    # What is read back is what was there.
    again = numbered(ITEMS.validate_python(stored), set())
    assert again == stored


@given(st.integers(0, 12), st.integers(1, 5), st.sampled_from(["asc", "desc"]))
def test_pages_make_the_whole(count: int, limit: int, order: str) -> None:
    items = [{"id": str(number)} for number in range(count)]
    seen: list[Any] = []
    fields: dict[str, Any] = {"limit": str(limit), "order": order}
    while True:
        page = validated(InputItemsQuery, fields).page(items)
        seen += page["data"]
        if not page["has_more"]:
            break
        fields["after"] = page["last_id"]
    assert seen == (items if order == "asc" else items[::-1])


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "logprobs": None, "finish_reason": None}]}


def ending(reason: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}]}


def arguments(text: str, **first: Any) -> dict[str, Any]:
    function = {"name": first.pop("name"), "arguments": text} if first else {"arguments": text}
    call = {"index": 0, **({"type": "function"} if first else {}), **first, "function": function}
    return delta(tool_calls=[call])


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 5, "completion_tokens": 8, "prompt_tokens_details": None},
}


def translation(**fields: Any) -> ResponseTranslation:
    request = ask(**fields)
    return ResponseTranslation(begun(request, request.chat([]), "m"))


def told(
    chunks: list[dict[str, Any]], error: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """The events of a stream; all of them parse as the SDK's types."""
    way_back = translation()
    data = b"".join(way_back.chunk(chunk) for chunk in chunks)
    data += way_back.failure({"error": error}) if error else way_back.end()
    data += way_back.terminal()
    for number, block in enumerate(data.decode().removesuffix("\n\n").split("\n\n")):
        event = json.loads(block.partition("\ndata: ")[2])
        assert EVENT.validate_python(event).type == event["type"]
        assert event["sequence_number"] == number
        yield event


def test_reasoning_that_clients_keep_unread_comes_back() -> None:
    fields: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "store": False}
    request = ask(**fields)
    assert request.wants_sealed_reasoning
    message = {"content": "Ja.", "reasoning_content": "Größer."}
    completion = {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": USAGE["usage"],
    }
    bare = begun(request, request.chat([]), "m")
    whole = ResponseTranslation(bare, seal_reasoning=True).answer(completion)["output"][0]
    way_back = ResponseTranslation(bare, seal_reasoning=True)
    for chunk in (delta(reasoning_content="Größer."), delta(content="Ja."), ending("stop")):
        way_back.chunk(chunk)
    way_back.end()
    for item in (whole, way_back.response["output"][0]):
        kept = {name: item[name] for name in ("type", "id", "summary", "encrypted_content")}
        sent = ask(
            input=[kept, {"role": "assistant", "content": "Ja."}, {"role": "user", "content": "?"}]
        )
        assert sent.chat([]).messages[0].reasoning_content == "Größer."
    assert "encrypted_content" not in ResponseTranslation(bare).answer(completion)["output"][0]


def test_a_stream_with_everything() -> None:
    events = list(
        told(
            [
                delta(role="assistant", content=""),
                delta(reasoning_content="I "),
                delta(reasoning_content="look."),
                delta(content="Wait"),
                delta(content="."),
                arguments("", id="call_1", name="look"),
                arguments('{"at":'),
                arguments('"it"}'),
                arguments("{}", id="call_2", name="look"),
                ending("tool_calls"),
                USAGE,
            ]
        )
    )
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.delta", "reasoning_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done"),
        "output_item.added",
        *["function_call_arguments.delta"] * 2,
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    last = events[-1]["response"]
    assert [event["item"] for event in events if event["type"].endswith("item.done")] == last[
        "output"
    ]
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2, 3}
    assert [item["type"] for item in last["output"]] == [
        *("reasoning", "message", "function_call", "function_call")
    ]
    assert last["output"][2]["arguments"] == '{"at":"it"}'
    # 7 of its 31 characters are reasoning, of 8 tokens.
    details = last["usage"]["output_tokens_details"]
    assert details == {"reasoning_tokens": 2, "estimated": True}
    assert Response.model_validate(last).status == "completed"


def test_a_whole_answer_says_the_same() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    message = {"content": "Wait.", "reasoning_content": "I look.", "tool_calls": [call]}
    choice = {"message": message, "finish_reason": "tool_calls", "logprobs": None}
    whole = translation().answer({"choices": [choice], "usage": USAGE["usage"]})
    *_, last = told(
        [
            delta(reasoning_content="I look."),
            delta(content="Wait."),
            arguments("{}", id="call_1", name="look"),
            ending("tool_calls"),
            USAGE,
        ]
    )
    Response.model_validate(whole)
    for item in (*whole["output"], *last["response"]["output"]):
        del item["id"]
    assert whole["output"] == last["response"]["output"]
    assert whole["usage"] == last["response"]["usage"]


@pytest.mark.parametrize(
    ("chunks", "tokens"),
    [
        ([delta(content="x")], {"reasoning_tokens": 0}),
        ([delta(reasoning_content="x")], {"reasoning_tokens": 8}),
    ],
)
def test_reasoning_tokens_that_are_known(chunks: list[Any], tokens: dict[str, Any]) -> None:
    *_, last = told([*chunks, ending("stop"), USAGE])
    assert last["response"]["usage"]["output_tokens_details"] == tokens


def test_reasoning_tokens_that_the_engine_counts() -> None:
    counted = {**USAGE["usage"], "completion_tokens_details": {"reasoning_tokens": 3}}  # type: ignore[dict-item]
    chunks = [delta(reasoning_content="x"), delta(content="y"), ending("stop")]
    *_, last = told([*chunks, {"choices": [], "usage": counted}])
    assert last["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}


def test_an_answer_without_words() -> None:
    events = list(told([delta(role="assistant", content=""), ending("stop"), USAGE]))
    assert events[-1]["type"] == "response.completed"
    [item] = events[-1]["response"]["output"]
    assert item["content"][0]["text"] == ""


@pytest.mark.parametrize("chunks", [[], [delta(content="Wai")]])
def test_a_stream_that_breaks(chunks: list[dict[str, Any]]) -> None:
    error = {"message": "gone", "type": "api_error", "param": None, "code": "engine_stopped"}
    events = list(told(chunks, error))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2]["message"] == "gone"
    response = events[-1]["response"]
    assert (response["status"], response["error"]["message"]) == ("failed", "gone")
    assert [item["status"] for item in response["output"]] == ["incomplete"] * len(chunks)


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        ("messages", "input"),
        ("messages[3].content[0].image_url", "input"),
        ("response_format", "text.format"),
        ("reasoning_effort", "reasoning.effort"),
        ("max_completion_tokens", "max_output_tokens"),
        ("tools[1].function.parameters", "tools[1].parameters"),
        ("tool_choice", "tool_choice"),
        (None, None),
    ],
)
def test_errors_speak_of_what_was_sent(param: str | None, expected: str | None) -> None:
    error = {"message": f"'{param}': no.", "type": "invalid_request_error", "param": param}
    said = translation().refusal(400, {"error": error})["error"]
    assert said["param"] == expected
    assert said["message"] == f"'{expected}': no."


def test_the_response_tells_what_was_asked_for() -> None:
    schema = {"type": "object", "properties": {}, "maxProperties": 2**70}
    tool = {"type": "function", "name": "look", "parameters": schema, "strict": True}
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    response = translation(
        tools=[tool],
        tool_choice={"type": "function", "name": "look"},
        text={"format": form},
        metadata={"a": "b"},
        max_output_tokens=9,
        top_p=0.5,
        instructions="Be.",
    ).response
    parsed = Response.model_validate(response)
    assert response["text"]["format"] == form
    assert response["tool_choice"] == {"type": "function", "name": "look"}
    assert parsed.max_output_tokens == 9
    assert (parsed.top_p, parsed.temperature) == (0.5, None)
    assert parsed.instructions == "Be."


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
    | st.sampled_from(["user", "assistant", "message", "reasoning", "function_call", "function"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "role", "content", "id", "name", "text", "format", "tools"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(ResponseRequest.model_fields)), JUNK, max_size=4),
    st.lists(
        st.dictionaries(
            st.sampled_from(["type", "role", "content", "id", "call_id", "output", "arguments"]),
            JUNK,
            max_size=5,
        ),
        max_size=3,
    ),
)
def test_whatever_is_sent_is_honoured_or_refused(
    fields: dict[str, Any], items: list[dict[str, Any]]
) -> None:
    try:
        request = ResponseRequest.of({"model": "m", "input": items, **fields})
        response = begun(request, request.chat([]), "m")
    except ApiError:
        return
    Response.model_validate(response)
    for item in numbered(request.items, set()):
        SDK_ITEM.validate_python(item)
