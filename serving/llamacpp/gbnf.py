"""Grammars in llama.cpp's GBNF, in llguidance's Lark."""

from __future__ import annotations

import re

from llguidance.gbnf_to_lark import gbnf_to_lark

_REPEAT = re.compile(r"[?*+]|\{\d+(?:,\d*)?\}")
_TOKEN = re.compile(
    rf"""
    (?P<repeat>{_REPEAT.pattern})
    | (?P<atom>"(?:\\.|[^"\\])*"i? | /(?:\\.|[^/\\\n])+/[a-z]* | \w+)
    | (?P<other>.|\n)
    """,
    re.VERBOSE,
)


def to_lark(grammar: str) -> str:
    """The same grammar in Lark; raises whatever llguidance's converter does for one that is none.

    The converter leaves out parentheses around what is repeated, and then repeated again.
    """
    return _with_parentheses(gbnf_to_lark(grammar))


def _with_parentheses(lark: str) -> str:
    r"""``"a"?*`` as ``("a"?)*``: Lark repeats an atom once."""
    written: list[str] = []
    opened: list[int] = []
    # Where the atom begins that a repeat stands behind.
    start, is_repeated = 0, False
    for token in _TOKEN.finditer(lark):
        text = token[0]
        if token.lastgroup == "repeat":
            if is_repeated:
                written.insert(start, "(")
                written.append(")")
            is_repeated = True
        else:
            is_repeated = False
            start = opened.pop() if text == ")" and opened else len(written)
            if text == "(":
                opened.append(start)
        written.append(text)
    return "".join(written)
