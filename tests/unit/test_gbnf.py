"""llama.cpp's grammars reach llguidance as they are meant."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher

from serving.llamacpp.gbnf import to_lark


@pytest.mark.parametrize(
    ("grammar", "start"),
    [
        ('("a"?)?', '("a"?)?'),
        ('("a"+)?', '("a"+)?'),
        ('((("a")?)*)+', '(("a"?)*)+'),
        ('("a"{2,})*', '("a"{2,})*'),
        ('(("a" "b")+)?', '(("a" "b")+)?'),
        ('"??" ("(?"?)?', '"??" ("(?"?)?'),
        (r'"\"?*" ([/?*]+)?', r'"\"?*" (/[\/?*]/+)?'),
        ('("a" "b"?)?', '("a" "b"?)?'),
        ('"a"? "b"*', '"a"? "b"*'),
    ],
)
def test_what_is_repeated_may_be_repeated_again(grammar: str, start: str) -> None:
    text = to_lark(f"root ::= {grammar}")
    assert text.splitlines()[-1] == f"start: {start}"
    failed, messages = LLMatcher.validate_grammar_with_warnings(text)
    assert not failed, messages
