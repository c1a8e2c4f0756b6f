"""The fields that ask for structured output, and which of them go together."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest
from serving.protocol.structured import ConstraintSpec

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {"const": "é"}}}


def chat(**fields: Any) -> ConstraintSpec | None:
    return ChatCompletionRequest.parse(json.dumps(CHAT | fields).encode()).constraint


def text(**fields: Any) -> ConstraintSpec | None:
    return CompletionRequest.parse(json.dumps(TEXT | fields).encode()).constraint


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a-name", **fields}}


@pytest.mark.parametrize("ask", [chat, text])
def test_nothing_asked_is_no_constraint(ask: Any) -> None:
    assert ask() is None
    assert ask(structured_outputs=None, guided_json=None) is None
    assert ask(structured_outputs={}) is None
    assert ask(structured_outputs={"json_object": False}) is None


def test_response_format_is_honoured() -> None:
    assert chat(response_format=None) is None
    assert chat(response_format={"type": "text"}) is None
    json_object = ConstraintSpec("json_object", "", "response_format")
    assert chat(response_format={"type": "json_object"}) == json_object
    for strict in (True, False, None):
        spec = chat(response_format=json_schema(schema=SCHEMA, strict=strict, description="d"))
        assert spec is not None
        assert (spec.kind, spec.param) == ("json_schema", "response_format")
        assert json.loads(spec.source) == SCHEMA
        assert list(json.loads(spec.source)["properties"]) == ["b", "a"]
    assert chat(response_format=json_schema()) == json_object


@pytest.mark.parametrize("ask", [chat, text])
@pytest.mark.parametrize(
    ("new", "old", "kind", "value"),
    [
        ("json", "guided_json", "json_schema", SCHEMA),
        ("json", "guided_json", "json_schema", json.dumps(SCHEMA)),
        ("regex", "guided_regex", "regex", "[a-z]+"),
        ("choice", "guided_choice", "choice", ["yes", "no"]),
        ("grammar", "guided_grammar", "lark", 'start: "a"'),
    ],
)
def test_vllms_names_new_and_old_mean_the_same(
    ask: Any, new: str, old: str, kind: str, value: Any
) -> None:
    for fields, param in (
        ({"structured_outputs": {new: value}}, f"structured_outputs.{new}"),
        ({old: value}, old),
    ):
        spec = ask(**fields)
        assert (spec.kind, spec.param) == (kind, param)
        assert spec.source == value or json.loads(spec.source) == value


@pytest.mark.parametrize("ask", [chat, text])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": True, "grammar": "a"}}, "structured_outputs.gramm"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"guided_json": {}, "guided_grammar": "a"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"structured_outputs": {"json": "nope"}}, "structured_outputs.json"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"guided_decoding_backend": "xgrammar"}, "guided_decoding_backend"),
    ],
)
def test_more_than_one_form_or_a_bad_one_is_refused_by_name(
    ask: Any, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as refused:
        ask(**fields)
    assert refused.value.status == 400
    assert refused.value.param is not None
    assert refused.value.param.startswith(param)
    assert refused.value.param in refused.value.message


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "text", "json_schema": {"name": "x"}}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name"),
        (json_schema(name="a b"), "response_format.json_schema.name"),
        (json_schema(schema=[]), "response_format.json_schema.schema"),
        (json_schema(schemas={}), "response_format.json_schema.schemas"),
        ("json_object", "response_format"),
    ],
)
def test_a_bad_response_format_is_refused_by_name(form: Any, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(response_format=form)
    assert refused.value.param == param


def test_response_format_excludes_the_other_ways() -> None:
    with pytest.raises(ApiError) as refused:
        chat(response_format={"type": "json_object"}, guided_json=SCHEMA)
    assert refused.value.param == "guided_json"
    assert "response_format" in refused.value.message
    assert chat(response_format={"type": "text"}, guided_json=SCHEMA) is not None


def test_text_completions_have_no_response_format() -> None:
    with pytest.raises(ApiError) as refused:
        text(response_format={"type": "json_object"})
    assert refused.value.param == "response_format"
