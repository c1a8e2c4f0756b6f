"""Arguments that are not written as JSON, and what their schema says of them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

STRING = frozenset(("string",))
ANYTHING: frozenset[str] = frozenset()

_KINDS: dict[type, frozenset[str]] = {
    bool: frozenset(("boolean",)),
    int: frozenset(("integer", "number")),
    float: frozenset(("number",)),
    str: STRING,
    list: frozenset(("array",)),
    dict: frozenset(("object",)),
    type(None): frozenset(("null",)),
}
_MOST_REFERENCES = 8
# Templates show models Python's way to write these.
_FROM_PYTHON = {"True": "true", "False": "false", "None": "null"}


def resolved(schema: Any, whole: dict[str, Any]) -> dict[str, Any]:
    """A schema within ``whole``, its reference followed; an empty one for what is none."""
    for _ in range(_MOST_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        reference, schema = str(schema["$ref"]), whole
        for step in filter(None, reference.removeprefix("#").split("/")):
            schema = schema.get(step) if isinstance(schema, dict) else None
    return schema if isinstance(schema, dict) else {}


def kinds_of(schema: Any) -> frozenset[str]:
    """The JSON types a schema allows; empty if it does not say, or is none."""
    if not isinstance(schema, dict):
        return ANYTHING
    with contextlib.suppress(TypeError):
        return _kinds_of(schema)
    return ANYTHING


def _kinds_of(schema: dict[str, Any]) -> frozenset[str]:
    if "type" in schema:
        return frozenset([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    if choices := choices_of(schema):
        kinds = [_KINDS[type(choice)] for choice in choices]
    else:
        kinds = [kinds_of(option) for option in options_of(schema)]
    return ANYTHING.union(*kinds) if all(kinds) else ANYTHING


def choices_of(schema: dict[str, Any]) -> list[Any]:
    """The only values a schema allows, if it lists them."""
    return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))


def options_of(schema: dict[str, Any]) -> list[Any]:
    """The schemas of which one must hold."""
    return list(schema.get("anyOf") or schema.get("oneOf") or ())


def to_json(text: str, kinds: frozenset[str] = STRING) -> str:
    """What a model wrote as JSON: a value of one of ``kinds`` if it reads so, or else a string."""
    plain = _FROM_PYTHON.get(text.strip(), text.strip())
    try:
        value = json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = text
    as_type = int if isinstance(value, float) and value.is_integer() else type(value)
    if as_type is not str and (not kinds or kinds & _KINDS[as_type]):
        return plain
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
