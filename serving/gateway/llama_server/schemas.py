"""JSON Schema as far as llama-server holds output to it. What it leaves out without a word is found here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_ANNOTATIONS = frozenset(
    (
        *("$comment", "$schema", "$id", "title", "description", "default", "examples"),
        *("deprecated", "readOnly", "writeOnly", "$defs", "definitions"),
    )
)
_OF_TYPE: dict[str, frozenset[str]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_FORMATS = ("date", "time", "date-time", "uuid")


def reason_to_refuse(schema: Any, where: str = "#") -> str | None:
    """What of a schema llama-server would not hold an answer to; None if there is nothing."""
    return next(_refusals(schema, where), None)


def _refusals(schema: Any, where: str) -> Iterator[str]:
    if not isinstance(schema, dict):
        yield f"{where} must be an object"
        return
    rules = schema.keys() - _ANNOTATIONS
    for name in ("$defs", "definitions"):
        for key, part in _mapping(schema.get(name)).items():
            yield from _refusals(part, f"{where}/{name}/{key}")
    if "$ref" in rules:
        if not str(schema["$ref"]).startswith("#"):
            yield f"{where}/$ref must point into this schema, as '#/$defs/...' does"
        yield from _beside(rules, {"$ref"}, where)
    elif "anyOf" in rules:
        for index, part in enumerate(_listed(schema["anyOf"])):
            yield from _refusals(part, f"{where}/anyOf/{index}")
        yield from _beside(rules, {"anyOf"}, where)
    elif "const" in rules or "enum" in rules:
        # It looks at the first of them only, and at no type.
        yield from _beside(rules, {"const" if "const" in rules else "enum", "type"}, where)
    else:
        yield from _of_types(schema, rules, where)


def _of_types(schema: dict[str, Any], rules: set[str], where: str) -> Iterator[str]:
    kinds = _listed(schema.get("type", "object" if "properties" in rules else None))
    if kinds == [None]:
        yield from _beside(rules, set(), where)
        return
    known: set[str] = {"type"}
    for kind in kinds:
        if kind not in _OF_TYPE:
            yield f"{where}/type: {kind!r} is no type"
            return
        known |= _OF_TYPE[kind]
    yield from _beside(rules, known, where)
    properties = _mapping(schema.get("properties"))
    for name in _listed(schema.get("required", [])):
        if name not in properties:
            yield f"{where}/required: {name!r} is not in properties"
    for name, part in properties.items():
        yield from _refusals(part, f"{where}/properties/{name}")
    for key in ("items", "additionalProperties"):
        if key in rules and not isinstance(schema[key], bool):
            yield from _refusals(schema[key], f"{where}/{key}")
    if "format" in rules:
        if schema["format"] not in _FORMATS:
            yield f"{where}/format: {schema['format']!r} is not known there; these are: {', '.join(_FORMATS)}"
        yield from _beside(rules - {"format", "type"}, set(), where)


def _beside(rules: set[str], known: set[str], where: str) -> Iterator[str]:
    for rule in sorted(rules - known):
        beside = f" beside {', '.join(sorted(known))}" if known - {"type"} else ""
        yield f"{where}/{rule} would not be enforced{beside}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
