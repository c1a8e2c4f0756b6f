"""What the config changes about requests: parameters set, bounded and dropped; mistakes are found at the start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serving.cli import main
from serving.config import ConfigError, FiltersConfig, LlamaCppModel
from serving.gateway.filters import Filters, filters_of, ignored_header
from serving.protocol.embeddings import EmbeddingRequest, TokenizeRequest
from serving.protocol.errors import ApiError
from serving.protocol.openai_responses import ResponseRequest
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest
from tools import api_docs

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def model(*, lenient: bool | None = None, **filters: Any) -> LlamaCppModel:
    return LlamaCppModel(
        name="m",
        source="package://a/b.gguf",
        lenient=lenient,
        filters=FiltersConfig.model_validate(filters),
    )


def through(
    kind: type[ModelRequest], fields: dict[str, Any], **filters: Any
) -> tuple[Any, list[str]]:
    """A request as its engine gets it, and what of it does not count."""
    change = Filters(model(**filters), lenient=False)
    asked, dropped = change.read(fields, kind.of)
    result, overruled = change.apply(asked)
    return result, dropped + overruled


def chat(fields: dict[str, Any], **filters: Any) -> tuple[ChatCompletionRequest, list[str]]:
    return through(ChatCompletionRequest, {**HELLO, **fields}, **filters)


def test_without_filters_a_request_stays_what_it_is() -> None:
    asked = ChatCompletionRequest.of(HELLO)
    assert Filters(model(), lenient=False).apply(asked) == (asked, [])
    assert Filters(None, lenient=False).apply(asked) == (asked, [])


@pytest.mark.parametrize(
    ("sent", "temperature"), [({}, 0.5), ({"temperature": None}, 0.5), ({"temperature": 1}, 1.0)]
)
def test_a_default_stands_where_the_request_is_silent(
    sent: dict[str, Any], temperature: float
) -> None:
    request, ignored = chat(sent, defaults={"temperature": 0.5})
    assert request.temperature == temperature
    assert ignored == []


@pytest.mark.parametrize(
    ("sent", "ignored"),
    [({}, []), ({"temperature": 1}, ["temperature"]), ({"temperature": 0.5}, [])],
)
def test_what_is_forced_overrules_the_request(sent: dict[str, Any], ignored: list[str]) -> None:
    request, told = chat(sent, forced={"temperature": 0.5})
    assert request.temperature == 0.5
    assert told == ignored


def test_parameters_are_taken_out_before_the_request_is_checked() -> None:
    sent = {"store": True, "temperature": "hot", "seed": 3}
    request, ignored = chat(sent, stripped=["store", "temperature", "top_p"])
    assert (request.temperature, request.seed) == (None, 3)
    assert ignored == ["store", "temperature"]


def test_stripped_parameters_are_also_taken_out_of_translated_requests() -> None:
    change = Filters(model(stripped=["reasoning_effort"]), lenient=False)

    def read(fields: dict[str, Any]) -> ChatCompletionRequest:
        return ChatCompletionRequest.of({**HELLO, "reasoning_effort": fields["effort"]})

    asked, dropped = change.read({"effort": "low"}, read)
    result, overruled = change.apply(asked)
    assert result.reasoning_effort is None
    assert dropped + overruled == ["reasoning_effort"]


def test_a_parameter_applies_where_it_exists_and_means_this() -> None:
    filters: dict[str, Any] = {"forced": {"logprobs": True, "temperature": 0, "suffix": "."}}
    request, _ = chat({}, **filters)
    assert (request.logprobs, request.temperature) == (True, 0)
    text, _ = through(CompletionRequest, {"model": "m", "prompt": "a", "logprobs": 2}, **filters)
    assert (text.logprobs, text.temperature, text.suffix) == (2, 0, ".")
    vectors, ignored = through(EmbeddingRequest, {"model": "m", "input": "a"}, **filters)
    assert vectors == EmbeddingRequest.of({"model": "m", "input": "a"})
    assert ignored == []


def test_objects_in_a_request_survive() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    sent = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "b"},
        ],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "safety_identifier": "u",
    }
    plain = ChatCompletionRequest.of({**HELLO, **sent})
    request, ignored = chat(sent, defaults={"seed": 1})
    assert request == plain.model_copy(update={"seed": 1})
    assert ignored == []


@pytest.mark.parametrize(
    ("sent", "default", "ceiling", "limit", "ignored"),
    [
        ({}, None, None, None, []),
        ({}, 5, None, 5, []),
        ({}, None, 9, 9, []),
        ({}, 5, 9, 5, []),
        ({"max_tokens": 7}, 5, 9, 7, []),
        ({"max_tokens": 70}, 5, 9, 9, ["max_tokens"]),
        ({"max_completion_tokens": 70}, None, 9, 9, ["max_completion_tokens"]),
        (
            {"max_tokens": 70, "max_completion_tokens": 70},
            *(None, 9, 9, ["max_completion_tokens", "max_tokens"]),
        ),
    ],
)
def test_the_limit_of_tokens_of_a_chat(
    sent: dict[str, Any],
    default: int | None,
    ceiling: int | None,
    limit: int | None,
    ignored: list[str],
) -> None:
    request, told = chat(sent, max_tokens_default=default, max_tokens_ceiling=ceiling)
    assert request.token_limit == limit
    assert told == ignored


@pytest.mark.parametrize(
    ("sent", "default", "ceiling", "limit"),
    [
        ({}, None, 100, 16),  # OpenAI's own default for this endpoint
        ({}, 50, 100, 50),
        ({}, None, 9, 9),
        ({"max_tokens": 200}, 50, 100, 100),
        ({"max_tokens": 0, "echo": True}, 50, 100, 0),
    ],
)
def test_the_limit_of_tokens_of_a_text(
    sent: dict[str, Any], default: int | None, ceiling: int | None, limit: int
) -> None:
    fields = {"model": "m", "prompt": "a", **sent}
    request, _ = through(
        CompletionRequest, fields, max_tokens_default=default, max_tokens_ceiling=ceiling
    )
    assert request.token_limit == limit


@pytest.mark.parametrize(
    ("first", "roles", "text"),
    [
        ({"role": "user", "content": "hi"}, ["system", "user"], "Be brief."),
        ({"role": "system", "content": "Rhyme."}, ["system"], "Be brief.\n\nRhyme."),
        ({"role": "developer", "content": "Rhyme."}, ["developer"], "Be brief.\n\nRhyme."),
        (
            {"role": "system", "content": [{"type": "text", "text": "Rhyme."}]},
            ["system"],
            "Be brief.\n\nRhyme.",
        ),
    ],
)
def test_a_system_prompt_stands_before_the_conversations_own(
    first: dict[str, Any], roles: list[str], text: str
) -> None:
    last = {"role": "user", "content": "so?"}
    fields = {"model": "m", "messages": [first, last]}
    kinds: tuple[type[ModelRequest], ...] = (ChatCompletionRequest, TokenizeRequest)
    for kind in kinds:
        request, ignored = through(kind, fields, system_prompt="Be brief.")
        assert [message.role for message in request.messages] == [*roles, "user"]
        assert request.messages[0].text == text
        assert ignored == []
    text_request, _ = through(TokenizeRequest, {"model": "m", "prompt": "a"}, system_prompt="Hm.")
    assert text_request.prompt == "a"


def test_a_request_that_does_not_go_with_a_default_is_refused() -> None:
    with pytest.raises(ApiError) as caught:
        chat({"logprobs": False}, defaults={"logprobs": True, "top_logprobs": 2})
    assert (caught.value.status, caught.value.param) == (400, "top_logprobs")


@pytest.mark.parametrize(
    ("filters", "key", "words"),
    [
        ({"forced": {"temprature": 1}}, "forced.temprature", "Unknown parameter"),
        ({"defaults": {"a.b": 1}}, "defaults.a.b", "Unknown parameter"),
        ({"forced": {"temperature": 3}}, "forced.temperature", "less than or equal to 2"),
        ({"defaults": {"stop": ["a", ""]}}, "defaults.stop", "must not be empty"),
        ({"defaults": {"logprobs": "yes"}}, "defaults.logprobs", "logprobs"),
        ({"defaults": {"top_logprobs": 2}}, "defaults.top_logprobs", "only allowed when"),
        ({"defaults": {"store": True}}, "defaults.store", "never stored"),
        ({"forced": {"tool_choice": "maybe"}}, "forced.tool_choice", "tool_choice"),
        ({"forced": {"model": "x"}}, "forced.model", "for clients to say"),
        ({"forced": {"stream": True}}, "forced.stream", "for clients to say"),
        ({"stripped": ["messages"]}, "stripped.messages", "for clients to say"),
        ({"defaults": {"max_tokens": 9}}, "defaults.max_tokens", "max_tokens_default"),
        (
            {"forced": {"guided_regex": "a", "structured_outputs": {"regex": "b"}}},
            "forced.guided_regex",
            "exclude each other",
        ),
    ],
)
def test_a_mistake_is_found_at_the_start_and_names_its_key(
    filters: dict[str, Any], key: str, words: str
) -> None:
    models = [model(), model(**filters)]
    with pytest.raises(ConfigError) as caught:
        filters_of(models, lenient=False)
    assert str(caught.value).startswith(f"config: models[1].filters.{key}: ")
    assert words in str(caught.value)


def test_a_mistake_is_shown_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rig.yaml"
    path.write_text(
        """\
models:
  - name: m
    source: hf://org/repo/file.gguf
    filters:
      defaults: {temperature: 0}
      forced:
        seed: 7
        temprature: 1
  - name: n
    source: hf://org/repo/file.gguf
    filters: {stripped: [model]}
"""
    )
    assert main(["config", "check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"error: {path}:8: models[0].filters.forced.temprature: Unknown")
    assert lines[1].startswith(f"{path}:11: models[1].filters.stripped.model: ")


def test_the_example_in_the_docs_is_good() -> None:
    example = (
        api_docs.FILE.read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    )
    [written] = yaml.safe_load(example)["models"]
    assert set(written["filters"]) == set(FiltersConfig.model_fields)
    filters_of([model(lenient=written["lenient"], **written["filters"])], lenient=False)


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"max_tokens_default": 9, "max_tokens_ceiling": 8}, "above max_tokens_ceiling"),
        ({"defaults": {"seed": 1}, "forced": {"seed": 2}}, "seed is among both"),
        ({"system_prompt": ""}, "at least 1 character"),
        ({"max_tokens_ceiling": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other(filters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FiltersConfig.model_validate(filters)


def lenient_read(fields: dict[str, Any], kind: type[ModelRequest] = ChatCompletionRequest) -> Any:
    return Filters(None, lenient=True).read({**HELLO, **fields}, kind.of)


def test_a_lenient_server_drops_what_it_does_not_know() -> None:
    turns = [
        {"role": "user", "content": "a", "mood": 1},
        {"role": "user", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c", "mood": 1}], "mood": 2},
        {"role": "assistant", "content": "d", "refusal": "no", "mood": 1},
    ]
    fields: dict[str, Any] = {
        "messages": turns,
        "store": True,
        "top-k": 3,
        "seed": 3,
        "metadata": {},
    }
    before = copy.deepcopy(fields)
    request, ignored = lenient_read(fields)
    assert request.seed == 3
    assert [message.text for message in request.messages] == ["a", "b", "c", "d"]
    assert set(ignored) == {
        *("store", "top-k", "messages[].mood", "messages[].content[].mood", "messages[].refusal")
    }
    assert fields == before


def test_what_is_about_tools_applies_to_requests_that_have_some() -> None:
    change = filters_of(
        [model(forced={"tool_choice": "required"}, defaults={"parallel_tool_calls": False})],
        lenient=False,
    )["m"]
    bare, ignored = change.apply(ChatCompletionRequest.of({**HELLO, "tool_choice": "none"}))
    assert (bare.tool_choice, bare.parallel_tool_calls, ignored) == ("none", None, [])
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {**HELLO, "tools": tools, "tool_choice": "auto"}
    asked, ignored = change.apply(ChatCompletionRequest.of(fields))
    assert (asked.tool_choice, asked.parallel_tool_calls) == ("required", False)
    assert ignored == ["tool_choice"]


def test_a_lenient_server_drops_tools_of_kinds_that_are_not_here() -> None:
    function = {"type": "function", "name": "f", "parameters": None}
    tools = [{"type": "web_search"}, function, {"type": "namespace", "name": "n", "tools": []}]
    change = Filters(None, lenient=True)
    fields = {"model": "m", "input": "a", "tools": tools}
    request, ignored = change.read(fields, ResponseRequest.of)
    assert [tool.name for tool in request.tools or ()] == ["f"]
    assert ignored == ["tools[]", "tools[]"]
    with pytest.raises(ApiError) as caught:
        ResponseRequest.of(fields)
    assert caught.value.param == "tools[0].type"


def test_a_lenient_server_drops_values_that_are_not_here() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,", "detail": "high"}}
    function = {"type": "function", "function": {"name": "f"}}
    request, ignored = lenient_read(
        {
            "service_tier": "priority",
            "messages": [{"role": "user", "content": [image]}],
            "tools": [{"type": "custom", "custom": {"name": "c"}}, function],
            "stream": True,
            "stream_options": {"include_usage": True, "include_obfuscation": True},
        }
    )
    assert request.service_tier is None
    assert request.has_images
    assert [tool.function.name for tool in request.tools or ()] == ["f"]
    assert request.wants_usage_chunk
    assert set(ignored) == {
        *("service_tier", "messages[].content[].image_url.detail", "tools[]"),
        "stream_options.include_obfuscation",
    }


def test_a_lenient_server_still_refuses_what_is_wrong() -> None:
    wrong: list[dict[str, Any]] = [
        {"temperature": 9},
        {"messages": []},
        {"tool_choice": "required"},
    ]
    for fields in wrong:
        with pytest.raises(ApiError) as caught:
            lenient_read(fields)
        assert caught.value.param == next(iter(fields))


def test_many_fields_are_no_oversight() -> None:
    with pytest.raises(ApiError) as caught:
        lenient_read({f"x{number}": 1 for number in range(100)})
    assert caught.value.code == "unknown_parameter"


def test_a_lenient_server_leaves_translated_fields_to_their_translator() -> None:
    def read(fields: dict[str, Any]) -> ChatCompletionRequest:
        return ChatCompletionRequest.of({**HELLO, "made_up": fields["effort"]})

    with pytest.raises(ApiError, match="made_up"):
        Filters(None, lenient=True).read({"effort": 1}, read)


@pytest.mark.parametrize(
    ("server", "own", "is_lenient"),
    [(False, None, False), (True, None, True), (True, False, False), (False, True, True)],
)
def test_a_model_may_differ_from_the_server(
    server: bool, own: bool | None, is_lenient: bool
) -> None:
    change = filters_of([model(lenient=own)], lenient=server)["m"]
    if is_lenient:
        assert change.read({**HELLO, "x": 1}, ChatCompletionRequest.of)[1] == ["x"]
    else:
        with pytest.raises(ApiError):
            change.read({**HELLO, "x": 1}, ChatCompletionRequest.of)


def test_the_header_holds_any_name() -> None:
    names = ["store", "messages[].mood", "a b\r\nx: y", "é", "store", "x" * 1000]
    header = ignored_header(names)
    assert header == f"store, messages[].mood, a%20b%0D%0Ax%3A%20y, %C3%A9, {'x' * 64}"


def test_config_check_finds_what_serve_would(
    model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rigserve.yaml"
    path.write_text(
        f"models: [{{name: m, engine: llama_cpp, source: {model_path}, filters: {{forced: {{temprature: 1}}}}}}]"
    )
    assert main(["config", "check", str(path)]) == 2
    assert "models[0].filters.forced.temprature" in capsys.readouterr().err
