"""Every field of OpenAI's request types is honoured or refused by name and with a reason; docs/api.md says which."""

from __future__ import annotations

import json
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import (
    batch_create_params,
    batch_list_params,
    file_create_params,
    file_list_params,
    shared_params,
)
from openai.types.chat import (
    chat_completion_assistant_message_param,
    chat_completion_content_part_image_param,
    chat_completion_content_part_text_param,
    chat_completion_developer_message_param,
    chat_completion_function_tool_param,
    chat_completion_message_function_tool_call_param,
    chat_completion_stream_options_param,
    chat_completion_system_message_param,
    chat_completion_tool_message_param,
    chat_completion_user_message_param,
)
from pydantic import BaseModel

from serving.gateway.filters import Filters
from serving.protocol import batches, requests
from serving.protocol.embeddings import EmbeddingRequest
from serving.protocol.errors import ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    ModelRequest,
    Refusal,
    RefusingBody,
    read_object,
)
from serving.protocol.structured import JsonSchema
from tools import api_docs

SMALLEST: dict[type[ModelRequest], dict[str, Any]] = {
    ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    CompletionRequest: {"model": "m", "prompt": "hi"},
    EmbeddingRequest: {"model": "m", "input": "hi"},
}
MESSAGES = (
    chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam,
    chat_completion_developer_message_param.ChatCompletionDeveloperMessageParam,
    chat_completion_system_message_param.ChatCompletionSystemMessageParam,
    chat_completion_tool_message_param.ChatCompletionToolMessageParam,
    chat_completion_user_message_param.ChatCompletionUserMessageParam,
)
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def refusal(kind: type[ModelRequest], fields: dict[str, Any]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        kind.of({**SMALLEST[kind], **fields})
    assert caught.value.status == 400
    return caught.value


def known(body: type[BaseModel]) -> set[str]:
    names = {field.alias or name for name, field in body.model_fields.items()}
    return names | set(body.refused if issubclass(body, RefusingBody) else ())


@pytest.mark.parametrize("kind", SMALLEST)
def test_every_field_of_openais_requests_is_known(kind: type[ModelRequest]) -> None:
    fields = api_docs.contract_fields(kind.path)
    assert {"model", "user"} < fields
    assert fields - known(kind) == set()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *((message, requests.Message) for message in MESSAGES),
        (
            chat_completion_content_part_text_param.ChatCompletionContentPartTextParam,
            requests.TextPart,
        ),
        (
            chat_completion_content_part_image_param.ChatCompletionContentPartImageParam,
            requests.ImagePart,
        ),
        (chat_completion_content_part_image_param.ImageURL, requests.ImageUrl),
        (chat_completion_function_tool_param.ChatCompletionFunctionToolParam, requests.Tool),
        (shared_params.FunctionDefinition, requests.Function),
        (
            chat_completion_message_function_tool_call_param.ChatCompletionMessageFunctionToolCallParam,
            requests.ToolCall,
        ),
        (
            chat_completion_stream_options_param.ChatCompletionStreamOptionsParam,
            requests.StreamOptions,
        ),
        (shared_params.response_format_json_schema.JSONSchema, JsonSchema),
    ],
)
def test_every_field_of_the_objects_in_them_is_known(theirs: type, ours: type[BaseModel]) -> None:
    fields = set(theirs.__annotations__)
    assert fields
    assert fields - known(ours) == set()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (batch_create_params.BatchCreateParams, batches.BatchRequest),
        (batch_create_params.OutputExpiresAfter, batches.ExpiresAfter),
        (batch_list_params.BatchListParams, batches.PageQuery),
        (file_create_params.ExpiresAfter, batches.ExpiresAfter),
        (file_list_params.FileListParams, batches.FilesQuery),
    ],
)
def test_every_field_of_files_and_batches_is_known(theirs: type, ours: type[BaseModel]) -> None:
    assert theirs.__annotations__.keys() == known(ours)


def test_every_field_of_an_upload_is_known() -> None:
    fields = set(file_create_params.FileCreateParams.__annotations__)
    assert fields == known(batches.UploadFields) | {"file"}


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"service_tier": "priority"}, "service_tier", "'priority' is not supported: no request"),
        ({"service_tier": "scale"}, "service_tier", "'flex' goes after"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "not padded",
        ),
        *(
            (
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": "x", "detail": detail}}
                            ],
                        }
                    ]
                },
                "messages[0].content[0].image_url.detail",
                "projector's matter",
            )
            for detail in ("low", "high", "original")
        ),
    ],
)
def test_a_refused_value_is_named_with_the_reason(
    fields: dict[str, Any], param: str, why: str
) -> None:
    error = refusal(ChatCompletionRequest, fields)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert why in error.message


@pytest.mark.parametrize(
    ("fields", "param", "why"),
    [
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice", "no other"),
        ({"response_format": "json"}, "response_format", "must be a JSON object"),
        ({"messages": ["hi"]}, "messages[0]", "must be a JSON object"),
        *(
            (
                {"messages": [{"role": "user", "content": [{"type": kind}]}]},
                "messages[0].content[0]",
                why,
            )
            for kind, why in (
                ("file", "read no files"),
                ("input_audio", "hear no audio"),
                ("refusal", "goes back as text"),
            )
        ),
    ],
)
def test_what_cannot_be_read_is_told_in_the_clients_words(
    fields: dict[str, Any], param: str, why: str
) -> None:
    error = refusal(ChatCompletionRequest, fields)
    assert (error.param, error.code) == (param, "invalid_value")
    assert why in error.message


REFUSALS = [(kind, name, refused) for kind in SMALLEST for name, refused in kind.refused.items()]


@pytest.mark.parametrize(("kind", "name", "refused"), REFUSALS)
def test_a_refused_field_is_named_with_the_reason(
    kind: type[ModelRequest], name: str, refused: Refusal
) -> None:
    error = refusal(kind, {name: {"something": "else"}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert error.message == f"'{name}' is not supported: {refused.reason}."
    for nothing in (None, *refused.nothing):
        assert kind.of({**SMALLEST[kind], name: nothing}) == kind.of(SMALLEST[kind])


def test_what_looks_like_nothing_is_not() -> None:
    assert refusal(ChatCompletionRequest, {"store": 0}).param == "store"
    assert refusal(CompletionRequest, {"best_of": True}).param == "best_of"


@pytest.mark.parametrize("name", ["audio", "function_call", "refusal", "annotations"])
def test_a_refused_field_of_a_message_is_named_with_the_reason(name: str) -> None:
    turns = [{"role": "assistant", "content": "a", name: "x"}]
    error = refusal(ChatCompletionRequest, {"messages": turns})
    assert (error.param, error.code) == (f"messages[0].{name}", "unsupported_parameter")
    assert requests.Message.refused[name].reason in error.message


@pytest.mark.parametrize("name", ["foo", "foo-bar", "str", "", "ü", "[0]"])
def test_an_unknown_field_is_named_whatever_it_is_called(name: str) -> None:
    error = refusal(ChatCompletionRequest, {name: 1})
    assert error.code == "unknown_parameter"
    assert error.location == (name,)
    assert error.message == f"Unknown parameter: '{name}'."


def test_long_names_are_cut() -> None:
    assert len(refusal(ChatCompletionRequest, {"x" * 10_000: 1}).message) < 300


def test_a_safety_identifier_is_a_user() -> None:
    def user(**fields: Any) -> str | None:
        return ChatCompletionRequest.of({**SMALLEST[ChatCompletionRequest], **fields}).user

    assert user(safety_identifier="a") == "a"
    assert user(safety_identifier="a", user=None) == "a"
    assert user(safety_identifier="a", user="b") == "b"
    error = refusal(ChatCompletionRequest, {"safety_identifier": "a" * 300})
    assert error.param == "safety_identifier"


def test_results_of_tools_answer_earlier_calls() -> None:
    def conversation(*turns: dict[str, Any]) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "hi"}, *turns]}

    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "water"}
    fields = conversation(called, result, {"role": "user", "content": "so?"}, result)
    assert ChatCompletionRequest.of({"model": "m", **fields}).messages[-1].text == "water"
    for turns in ((result,), (result, called), (called, {**result, "tool_call_id": "call_2"})):
        error = refusal(ChatCompletionRequest, conversation(*turns))
        assert error.param == f"messages[{len(turns) - (turns[-1] is called)}].tool_call_id"


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "auto"},
        {"parallel_tool_calls": False},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
    ],
)
def test_what_asks_for_nothing_without_tools_is_taken(fields: dict[str, Any]) -> None:
    kind = ChatCompletionRequest
    assert kind.of({**SMALLEST[kind], **fields}).tool_use is None


TURN = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}


def tools(count: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{number}"}} for number in range(count)]


@pytest.mark.parametrize(
    ("field", "most", "param"),
    [
        (lambda n: {"messages": [TURN] * n}, requests.MAX_MESSAGES, "messages"),
        (
            lambda n: {"messages": [{"role": "user", "content": [PART] * n}]},
            requests.MAX_PARTS,
            "messages[0].content",
        ),
        (
            lambda n: {"messages": [{"role": "assistant", "tool_calls": [CALL] * n}]},
            requests.MAX_TOOL_CALLS,
            "messages[0].tool_calls",
        ),
        (lambda n: {"tools": tools(n)}, requests.MAX_TOOLS, "tools"),
        (
            lambda n: {"logit_bias": {str(token): 1 for token in range(n)}},
            requests.MAX_LOGIT_BIASES,
            "logit_bias",
        ),
    ],
)
def test_counts_are_limited(field: Any, most: int, param: str) -> None:
    kind = ChatCompletionRequest
    kind.of({**SMALLEST[kind], **field(most)})
    error = refusal(kind, field(most + 1))
    assert error.param == param
    assert f"at most {most}" in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [TURN] * 250_000},
        {"messages": [{"role": "user", "content": [PART] * 300_000}]},
        {"logit_bias": {str(token): 1 for token in range(700_000)}},
        {"stream": True, "stream_options": {f"x{number}": 1 for number in range(700_000)}},
        {str(number): 1 for number in range(700_000)},
        {"chat_template_kwargs": {"x": [{}] * 3_000_000}},
    ],
    ids=["messages", "parts", "biases", "nested fields", "fields", "objects"],
)
def test_ten_megabytes_of_anything_take_no_time(fields: dict[str, Any]) -> None:
    body = orjson.dumps({**SMALLEST[ChatCompletionRequest], **fields})
    assert 6_000_000 < len(body) < 11_000_000
    started = time.process_time()
    with pytest.raises(ApiError):
        ChatCompletionRequest.parse(body)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "a", "model": "b"}', "two fields named 'model'"),
        (b'{"model": "a", "x": [{"y": 1, "y": 1}]}', "two fields named 'y'"),
        (b'{"x": 1e999}', "1e999 is out of range"),
        (b'{"x": -1e999}', "-1e999 is out of range"),
        (b'{"x": NaN}', "not valid JSON"),
        (b'{"x": -Infinity}', "not valid JSON"),
        (b'{"x": "\\udc00"}', "not valid JSON"),
        (b'{"x": "\xed\xa0\x80"}', "not valid JSON"),
        (b'{"x": "\x00"}', "not valid JSON"),
        ('{"x": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"x":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON"),
        (b"[" * 60_000, "not valid JSON"),
        (b"3", "must be a JSON object"),
    ],
)
def test_odd_json_is_refused(body: bytes, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_object(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert words in caught.value.message


_NAMES = st.sampled_from(
    sorted(set().union(*(known(kind) for kind in SMALLEST), known(requests.Message), {"type", "x"}))
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        ["", "auto", "none", "function", "text", "user", "tool", "json_schema", "\0"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(SMALLEST)), st.dictionaries(_NAMES, _VALUES, max_size=4), st.booleans())
def test_any_fields_are_taken_or_refused_with_a_400(
    kind: type[ModelRequest], fields: dict[str, Any], lenient: bool
) -> None:
    sent = read_object(json.dumps({**SMALLEST[kind], **fields}).encode())
    refused: ApiError | None = None
    try:
        request, _ = Filters(None, lenient=lenient).read(sent, kind.of)
    except ApiError as error:
        refused = error
    if refused is not None:
        assert refused.status == 400
        assert refused.message
        return
    # What the gateway has read, the engine reads again, and finds the same.
    written = request.model_dump_json(exclude_none=True, by_alias=True)
    read_again = kind.parse(written.encode())
    assert read_again.model_dump_json(exclude_none=True, by_alias=True) == written


def test_a_null_character_is_a_character() -> None:
    assert read_object(json.dumps({"x": "\0"}).encode()) == {"x": "\0"}


def test_the_table_in_the_docs_is_current() -> None:
    assert api_docs.FILE.read_text(encoding="utf-8") == api_docs.api_docs(), "run: make api-docs"
