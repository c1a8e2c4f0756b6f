"""Reasoning with the real model under a chat template that has it think first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from serving.models.gguf import read_header
from tests.processes import EngineServer

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
<think>
{% if enable_thinking is false %}

</think>

{% endif %}"""

# The model has never seen such blocks: it closes them because the conversation shows how.
SHOWN: Any = [
    turn
    for question, answer in (("2+2?", "4"), ("3+3?", "6"), ("1+1?", "2"))
    for turn in (
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"It is {answer}.", "reasoning_content": "I add them."},
    )
] + [{"role": "user", "content": "5+5?"}]


def with_template(model: Path, template: str, copy: Path) -> Path:
    """A copy of a GGUF file with another chat template, which must not be longer."""
    old = (read_header(model).text("tokenizer.chat_template") or "").encode()
    comment = "{#" + "#" * (len(old) - len(template.encode()) - 4) + "#}"
    data = model.read_bytes()
    assert data.count(old) == 1
    copy.write_bytes(data.replace(old, (template + comment).encode()))
    assert read_header(copy).text("tokenizer.chat_template") == template + comment
    return copy


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
