"""Reasoning with the real model under a chat template that has it think first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.processes import EngineServer
from tests.thinking import SHOWN, TEMPLATE, with_template


@pytest.fixture(scope="module")
def thinker(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    """An engine whose model's template opens a reasoning block."""
    model = with_template(model_path, TEMPLATE, tmp_path_factory.mktemp("thinker") / "model.gguf")
    with EngineServer(model, context_length=512, max_sequences=4) as server:
        yield server


def chat(engine: EngineServer, **options: Any) -> Any:
    fields: dict[str, Any] = {"messages": SHOWN, "max_tokens": 40, "temperature": 0} | options
    return engine.client.chat.completions.create(model="smol", **fields)


def test_reasoning_is_not_content(thinker: EngineServer) -> None:
    message = chat(thinker).choices[0].message
    assert "add" in message.reasoning_content
    assert "It is" in message.content
    assert "think>" not in message.content + message.reasoning_content


def test_a_stream_tells_them_apart_too(thinker: EngineServer) -> None:
    whole = chat(thinker).choices[0].message
    deltas = [chunk.choices[0].delta for chunk in chat(thinker, stream=True)]
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    content = "".join(delta.content or "" for delta in deltas)
    assert (reasoning, content) == (whole.reasoning_content, whole.content)


def test_an_answer_cut_off_in_thought_has_no_content(thinker: EngineServer) -> None:
    choice = chat(thinker, max_tokens=2).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.content is None
    assert choice.message.reasoning_content


def test_an_answer_can_be_sent_back_with_its_reasoning(thinker: EngineServer) -> None:
    message = chat(thinker).choices[0].message
    more = {"role": "user", "content": "6+6?"}
    with_it = chat(thinker, messages=[*SHOWN, message, more]).usage.prompt_tokens
    bare = {"role": "assistant", "content": message.content}
    without = chat(thinker, messages=[*SHOWN, bare, more]).usage.prompt_tokens
    assert with_it > without


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"choice": ["ten", "twelve"]}}},
        {"extra_body": {"structured_outputs": {"regex": "[0-9]{2}!"}}},
    ],
)
def test_a_form_is_for_the_answer_and_not_for_what_is_thought(
    thinker: EngineServer, form: dict[str, Any]
) -> None:
    message = chat(thinker, max_tokens=80, **form).choices[0].message
    assert "add" in message.reasoning_content
    assert re.fullmatch(r"\{[\s\S]*\}|ten|twelve|[0-9]{2}!", message.content)


def test_a_required_call_comes_after_the_reasoning(thinker: EngineServer) -> None:
    tool = {"type": "function", "function": {"name": "add_up", "parameters": None}}
    choice = chat(thinker, tools=[tool], tool_choice="required", max_tokens=80).choices[0]
    assert "add" in choice.message.reasoning_content
    assert choice.message.content is None
    assert choice.message.tool_calls[0].function.name == "add_up"


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_effort": "none"},
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    ],
)
def test_thinking_can_be_turned_off(thinker: EngineServer, options: dict[str, Any]) -> None:
    message = chat(thinker, max_tokens=8, **options).choices[0].message
    assert message.content
    assert not hasattr(message, "reasoning_content")


def test_unknown_variables_of_the_template_are_refused(thinker: EngineServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(thinker, extra_body={"chat_template_kwargs": {"enable_thinkin": False}})
    assert caught.value.param == "chat_template_kwargs.enable_thinkin"
