"""JSON Schema as far as output can be held to it; the rest is refused by name and place.

llguidance knows most of it. What it would ignore, or take too lightly, is found here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Path = tuple[int | str, ...]

_SCHEMAS_BY_NAME = frozenset(("properties", "patternProperties", "$defs", "definitions"))
_SCHEMA_LISTS = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_SCHEMAS = frozenset(("items", "additionalItems", "additionalProperties"))
_VALUES = frozenset(
    (
        *("const", "enum", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    )
)
_PLAIN = frozenset(
    (
        *("$ref", "type", "format", "pattern", "required", "uniqueItems", "minItems", "maxItems"),
        *("minLength", "maxLength", "minProperties", "maxProperties"),
    )
)
_ENFORCED = _SCHEMAS_BY_NAME | _SCHEMA_LISTS | _SCHEMAS | _VALUES | _PLAIN
_SHAPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("$ref", "$schema", "format", "pattern"), (str, "a text")),
    **dict.fromkeys((*_SCHEMA_LISTS, "enum", "required"), (list, "a list")),
    **dict.fromkeys(_SCHEMAS_BY_NAME, (dict, "an object")),
}
# Words about values, rather than rules for them.
_ANNOTATIONS = frozenset(
    (
        *("$comment", "$anchor", "title", "description", "default", "example", "examples"),
        *("deprecated", "discriminator", "readOnly", "writeOnly"),
    )
)
_OF_DOCUMENTS = frozenset(("$schema", "$id", "id"))
_OLD_DRAFT = re.compile(r"draft-0|draft/2019")

# llguidance's own patterns know a 29th of February in every year, and leap seconds at any time.
_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|"
    rf"(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_PATTERN_OF_FORMAT = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
}
_FORMATS = frozenset(("duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"))

# JSON has short escapes for the other control characters.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_LARGEST_INTEGER = 2**53

# llguidance parses JSON of 128 levels, a few of which are its own.
_DEEPEST = 100
# It follows references by recursion, each once: much more than this, times the safety of two, would
# overflow a thread's stack of 8 MiB and end the process.
_LONGEST_WAY = 1000

_ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?((?:\\.|[^\]\\])*)\]", re.DOTALL)
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_CLASS_SYNTAX = re.compile(r"\[|&&|--|~~")


# One space, as people write JSON, or none: given more room, small models fill it for ever. Without
# \u escapes a text has one spelling, so that no key can come twice in disguise.
_JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}


class Unsupported(Exception):
    """A ``keyword`` of the schema at ``path`` to which output cannot be held, and why."""

    def __init__(self, path: Path, keyword: str, reason: str = "is not supported") -> None:
        super().__init__(f"{keyword} {reason}")
        self.path = path
        self.keyword = keyword
        self.reason = reason


def make_enforceable(schema: dict[str, Any]) -> None:
    """Rewrite a schema, keeping its meaning, into what llguidance enforces to the letter or refuses.

    Raises :class:`Unsupported`.
    """
    is_old_draft = bool(_OLD_DRAFT.search(str(schema.get("$schema", ""))))
    steps = 0
    references = set()
    for path, part in _walk(schema):
        if isinstance(part, dict):
            _check(part, path, is_old_draft)
            references.add(part.get("$ref"))
        elif not isinstance(part, bool):
            raise Unsupported(
                path[:-1], str(path[-1]), "must be a schema: an object, true or false"
            )
        steps = max(steps, len(path))
        if steps > _DEEPEST:
            raise Unsupported(path[:_DEEPEST], str(path[_DEEPEST]), "is nested too deeply")
    if steps * len(references) > _LONGEST_WAY:
        raise Unsupported((), "$ref", "has too many schemas to follow; use fewer, or flatter ones")


def with_options(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with llguidance's options for how its JSON is written."""
    return {**schema, "x-guidance": _JSON_OPTIONS}


def blame(schema: dict[str, Any], fails: Callable[[dict[str, Any]], bool]) -> tuple[Path, str]:
    """Of a schema that fails: the innermost schema that does so alone, and the keyword to blame."""
    names = ("$schema", "$defs", "definitions")
    shared: dict[str, Any] = {name: schema[name] for name in names if name in schema}
    path: Path = ()
    while True:
        for step, child in _children(schema):
            if isinstance(child, dict) and fails({**shared, **child}):
                path, schema = path + step, child
                break
        else:
            break
    for keyword in sorted(schema, key=lambda keyword: keyword in ("properties", "type")):
        if keyword not in shared:
            without = {name: value for name, value in schema.items() if name != keyword}
            if not fails({**shared, **without}):
                return path, keyword
    return path, "type"


def check_pattern(pattern: str) -> str | None:
    """Why a regular expression would not mean to llguidance what it does to JavaScript and Python."""
    for found in _ESCAPE_OR_CLASS.finditer(pattern):
        syntax = _CLASS_SYNTAX.search(_ESCAPE.sub("", found[1] or ""))
        if syntax:
            return f"has {syntax[0]!r} inside [...]; escape it with a backslash"
    return None


def _children(schema: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The schemas within a schema, and the steps that lead to them."""
    for keyword, value in schema.items():
        if keyword in _SCHEMAS_BY_NAME and isinstance(value, dict):
            yield from (((keyword, name), child) for name, child in value.items())
        elif isinstance(value, list) and (keyword in _SCHEMA_LISTS or keyword == "items"):
            yield from (((keyword, index), child) for index, child in enumerate(value))
        elif keyword in _SCHEMAS:
            yield (keyword,), value


def _walk(schema: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """A schema and all within it, each before its own children."""
    yield path, schema
    if isinstance(schema, dict):
        for step, child in _children(schema):
            yield from _walk(child, path + step)


def _check(schema: dict[str, Any], path: Path, is_old_draft: bool) -> None:
    for keyword, value in schema.items():
        reason = _reason_to_refuse(schema, keyword, value, is_old_draft)
        if reason is None and keyword in _OF_DOCUMENTS and path:
            reason = "is only supported at the root of the schema"
        if reason is not None:
            raise Unsupported(path, keyword, reason)
    pattern = _PATTERN_OF_FORMAT.get(schema.get("format", ""))
    if pattern is not None:
        del schema["format"]
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": pattern}]
    schema.pop("uniqueItems", None)


def _reason_to_refuse(
    schema: dict[str, Any], keyword: str, value: Any, is_old_draft: bool
) -> str | None:
    shape, shape_name = _SHAPES.get(keyword, (object, ""))
    if not isinstance(value, shape):
        return f"must be {shape_name}"
    if keyword == "type" and not all(isinstance(each, str) for each in _listed(value)):
        return "must be a text or a list of texts"
    if keyword in _ANNOTATIONS or keyword in _OF_DOCUMENTS:
        return None
    if keyword not in _ENFORCED or (keyword == "uniqueItems" and value is not False):
        # Extensions (x-...) are annotations; llguidance takes options from its own.
        is_extension = keyword.startswith("x-") and keyword != "x-guidance"
        return None if is_extension else "is not supported"
    if keyword == "$ref" and not str(value).startswith("#"):
        return "must point into this schema, as '#/$defs/...' does"
    if keyword == "format" and value not in _FORMATS and value not in _PATTERN_OF_FORMAT:
        known = ", ".join(sorted(_FORMATS | _PATTERN_OF_FORMAT.keys()))
        return f"{value!r} is not supported; these are: {known}"
    if keyword == "prefixItems" and is_old_draft:
        return "is not known in the draft that '$schema' names; 'items' may be a list there"
    if keyword == "additionalItems" and not isinstance(schema.get("items"), list):
        return "has no effect unless 'items' is a list"
    if keyword == "items" and isinstance(value, list) and "prefixItems" in schema:
        return "cannot be a list beside 'prefixItems'"
    if keyword == "minProperties" and _unnamed(schema, value) > 1:
        return "cannot ask for two names that are not in 'required': one could be given twice"
    if keyword in _VALUES:
        return _unspeakable(value)
    for pattern in _patterns(keyword, value):
        reason = check_pattern(pattern)
        if reason is not None:
            return f"{pattern!r} {reason}"
    return None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _unnamed(schema: dict[str, Any], at_least: Any) -> int:
    """How many properties are asked for beyond those that are required by name."""
    required = schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    return at_least - named if isinstance(at_least, int) else 0


def _unspeakable(value: Any) -> str | None:
    """What in a value could not be generated exactly as it is."""
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        return f"has {value}, which is too large to be kept exactly"
    if isinstance(value, float) and abs(value) > _LARGEST_INTEGER:
        return f"has {value}, which is too large to be written without an exponent"
    if isinstance(value, str) and _CONTROL.search(value):
        return f"has {value!r}: its control character cannot be written"
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return next(filter(None, map(_unspeakable, value)), None)
    return None


def _patterns(keyword: str, value: Any) -> list[str]:
    if keyword == "pattern" and isinstance(value, str):
        return [value]
    return list(value) if keyword == "patternProperties" and isinstance(value, dict) else []
