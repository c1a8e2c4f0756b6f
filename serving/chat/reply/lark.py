"""Writing grammars in llguidance's Lark."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from serving.chat.json_schema import Unsupported, make_enforceable, with_options
from serving.protocol.errors import ApiError, dotted
from serving.protocol.requests import Function

_TAG = re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])")

Tokens = Callable[[str], int | None]
"""The id of the one token that is spelled as given; None if there is none."""


class Lark:
    """A grammar in the making. ``TEXT`` is any text; tags are tokens where the vocabulary has them."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._rules: dict[str, str] = {}

    def text(self, text: str) -> str:
        """An expression for exactly ``text``."""
        parts = [""]
        for piece in _TAG.split(text):
            token = self._tokens(piece) if _TAG.fullmatch(piece) else None
            if token is None:
                parts[-1] += piece
            else:
                parts += [f"<[{token}]>", ""]
        # Every second part is a token.
        return " ".join(
            part if place % 2 else json.dumps(part) for place, part in enumerate(parts) if part
        )

    def until(self, tag: str) -> str:
        """An expression for any text that ends with the first ``tag`` in it."""
        if self._tokens(tag) is not None:
            return f"TEXT {self.text(tag)}"
        return self.rule(f"TEXT {json.dumps(tag)}", lazy=True)

    def any_of(self, expressions: Iterable[str]) -> str:
        """The name of a rule: one of these."""
        return self.rule(" | ".join(expressions))

    def rule(self, expression: str, *, lazy: bool = False) -> str:
        """The name of a rule for an expression."""
        rule = f"{'[lazy]' if lazy else ''}: {expression}"
        return self._rules.setdefault(rule, f"rule_{len(self._rules)}")

    def finish(self, start: str) -> str:
        """The grammar of what ``start`` describes."""
        rules = [f"{name}{rule}" for rule, name in self._rules.items()]
        return "\n".join(["%llguidance {}", f"start: {start}", r"TEXT: /(?s:.*)/", *rules, ""])


def of_schema(schema: dict[str, Any]) -> str:
    """An expression for JSON that follows a schema; raises :class:`Unsupported`."""
    schema = copy.deepcopy(schema)
    make_enforceable(schema)
    return f"%json {json.dumps(with_options(schema))}"


def of_arguments(function: Function) -> str:
    """An expression for a function's arguments as JSON; raises :class:`ApiError` (400)."""
    try:
        return of_schema(parameters(function))
    except Unsupported as error:
        raise refusal(function, error) from error


def refusal(function: Function, error: Unsupported) -> ApiError:
    """The answer to a request with such a function."""
    place = f"at {dotted(error.path)}" if error.path else "at their root"
    message = f"'{error.keyword}' {place} {error.reason}"
    return ApiError(
        400,
        f"'tools': in the parameters of {function.name!r}, {message}.",
        param="tools",
        code="unsupported_value",
    )


def parameters(function: Function) -> dict[str, Any]:
    """The schema of a function's arguments; that of no arguments if the function has none."""
    if function.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}
