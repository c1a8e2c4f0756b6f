"""Chat templates are rendered as their models expect, and cannot do harm."""

from __future__ import annotations

import pytest

from serving.llamacpp.chat_template import ChatTemplate
from serving.protocol.errors import ApiError
from serving.protocol.requests import Message


def render(source: str | None, *messages: Message, adds_bos: bool = False) -> str:
    template = ChatTemplate(source, bos_text="<s>", eos_text="</s>", tokenizer_adds_bos=adds_bos)
    return template.render(messages or (Message(role="user", content="hi"),))


def test_turns_and_helpers() -> None:
    source = (
        "{%- for m in messages %}[{{ m.role }}|{{ m.content | tojson }}]{% endfor %}"
        "{% if add_generation_prompt %}[assistant|{% endif %}"
    )
    text = render(
        source, Message(role="developer", content="be <kind>"), Message(role="user", content="é")
    )
    assert text == '[system|"be <kind>"][user|"é"][assistant|'


def test_bos_is_not_doubled() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}"
    assert render(source, adds_bos=True) == "hi"
    assert render(source, adds_bos=False) == "<s>hi"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.x }}", "refuses"),
        ("{% for %}", "broken"),
        (None, "no chat template"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_a_template_that_fails_is_a_400(source: str | None, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        render(source)
    assert caught.value.status == 400
