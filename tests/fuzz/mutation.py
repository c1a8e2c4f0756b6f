"""Makes wrong requests of right ones. The same ``Random`` makes the same ones."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from random import Random
from typing import Any
from urllib.parse import quote

from tests.fuzz.corpus import KINDS, UPLOAD, Kind


@dataclass(frozen=True, slots=True)
class Raw:
    """JSON, or what looks like it, as it is to be sent."""

    text: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """An object whose fields may have the same names."""

    fields: tuple[tuple[str, Any], ...]


_NAMES = ("", "a" * 5000, "\0", "ünï", "\u2028", "__proto__", "model", "$ref", "type", "a.b[0]")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(0.5, -0.0, 1e308, 5e-324, 1e-9, -1e300),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e400", "-1e400", "01", "9" * 5000, "{", "]", "")),
    *map(Raw, ('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\\x"', '"\n"', "'a'", "\\")),
    *("", "a", "\0", "\r\nx: y", "\U0010ffff\u2028", "null", "1", "auto", "none", "x" * 100_000),
    *("user", "assistant", "system", "tool", "function", "text", "image_url", "json_schema"),
    *("data:image/png;base64,AAAA", "https://127.0.0.1:1/a.png", "file:///etc/passwd"),
    *("(a+)+$", "[", "\\p{L}{1,9999}", "start: \"a\"", "{{ 1/0 }}", "<|im_start|>system"),
    *([], {}, [[]], [None], [{}], {"a": {}}, {"": ""}, {"type": "text"}, {"type": "object"}),
    *([0] * 3000, ["a"] * 3000, [[1]] * 100, [-1], [10**9], ["", ""], {"type": "json_schema"}),
    {str(number): number for number in range(2000)},
    {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
    {"type": "array", "items": {"type": "string", "pattern": "(a|b)*"}, "minItems": 10**9},
    *map(Raw, ("[" * 90 + "]" * 90, "[" * 20_000, '{"a":' * 300 + "1" + "}" * 300)),
)  # fmt: skip


def wrong_body(random: Random, kind: Kind) -> bytes:
    """A body for ``kind``, wrong in one to four ways more often than not."""
    body: Any = copy.deepcopy(random.choice(kind.bodies))
    for _ in range(random.choice((1, 1, 2, 3, 4))):
        body = _changed(random, kind, body)
    sent = _json(body).encode("utf-8", errors="surrogatepass")
    return _garbled(random, sent) if random.random() < 0.1 else sent


def wrong_path(random: Random, pattern: str, ids: list[str]) -> str:
    """``pattern`` with an id, or something else, in place of ``{}``, and sometimes a query."""
    odd = ("", "a", "%", "%ff%00", "..", "%2e%2e%2f", "a/b", "x" * 3000, "é", "\u2028", "-1")
    word = random.choice(ids) if ids and random.random() < 0.5 else quote(random.choice(odd), "%/")
    path = pattern.replace("{}", word)
    if random.random() < 0.4:
        name = random.choice(("limit", "after", "order", "purpose", "include", "include[]", "x"))
        value = random.choice(("", "-1", "0", "5", "asc", "1e9", "a" * 500, "%00", "%ff", *ids[:3]))
        path += f"?{name}={value}" + random.choice(("", "&", f"&{name}=2"))
    return path


def wrong_form(random: Random) -> tuple[dict[str, str], bytes]:
    """The headers and the body of an upload."""
    fields = dict(UPLOAD)
    for _ in range(random.randrange(3)):
        name = random.choice((*fields, "file", "x", "expires_after[x]", "expires_after"))
        fields[name] = random.choice(("", "batch", "-1", "1e9", "vision", "\0", "é", "9" * 400))
    lines = [f'--b\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
             for name, value in fields.items() if random.random() < 0.9]  # fmt: skip
    name = random.choice(('"a.jsonl"', '"../../a"', '"\0"', '""', "a", '"' + "é" * 300 + '"'))
    lines.append(
        f'--b\r\ncontent-disposition: form-data; name="file"; filename={name}\r\n\r\n{{}}\n\r\n'
    )
    random.shuffle(lines)
    body = ("".join(lines) + "--b--\r\n").encode()
    if random.random() < 0.3:
        body = _garbled(random, body)
    boundary = random.choice(("b", "b", "b", "b", "c", '"'))
    return {"content-type": f"multipart/form-data; boundary={boundary}"}, body


def _changed(random: Random, kind: Kind, body: Any) -> Any:
    """The body with one thing changed, somewhere in it."""
    if random.random() < 0.35 and isinstance(body, dict):
        # One of the fields that this kind has, with a value that may be of its kind.
        name, schema = random.choice(list(kind.fields.items()))
        return body | {name: _value_of(random, schema)}
    places = list(_places(body))
    if not places:
        return _any(random)
    holder, key = random.choice(places)
    match random.randrange(7):
        case 0 | 1:
            holder[key] = _any(random)
        case 2:
            del holder[key]
        case 3:
            holder[key] = [holder[key]] * random.choice((1, 2, 50))
        case 4:
            holder[key] = copy.deepcopy(random.choice(random.choice(KINDS).bodies))
        case 5 if isinstance(holder, dict):
            holder[random.choice(_NAMES)] = _any(random)
        case 6 if isinstance(holder, dict):
            twice = Pairs((*holder.items(), (key, _any(random))))
            return twice if holder is body else _replaced(body, holder, twice)
    return body


def _any(random: Random) -> Any:
    return copy.deepcopy(random.choice(_VALUES))


def _value_of(random: Random, schema: dict[str, Any]) -> Any:
    """Something that a field of this schema may have, at times."""
    options = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    option = random.choice(options or [{}])
    if "enum" in option:
        return random.choice(option["enum"])
    small: dict[str, Any] = {
        "boolean": (True, False),
        "integer": (0, 1, 2, 100, -1),
        "number": (0, 0.3, 1, 2.5, -2),
        "string": ("a", "Hi.", ""),
        "array": ([], ["a"], [1], [{}]),
        "object": ({}, {"a": "b"}, {"type": "function"}),
    }
    values = small.get(option.get("type", ""), _VALUES)
    return copy.deepcopy(random.choice(values if random.random() < 0.8 else _VALUES))


def _places(value: Any) -> Any:
    """Each item of each object and list in ``value``: what holds it, and its name or index."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _replaced(value: Any, old: Any, new: Any) -> Any:
    if value is old:
        return new
    if isinstance(value, dict):
        return {name: _replaced(each, old, new) for name, each in value.items()}
    return [_replaced(each, old, new) for each in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict | Pairs):
        fields = value.fields if isinstance(value, Pairs) else value.items()
        return "{" + ",".join(f"{json.dumps(name)}:{_json(each)}" for name, each in fields) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    return json.dumps(value)


def _garbled(random: Random, sent: bytes) -> bytes:
    """Cut off, or with other bytes somewhere."""
    at = random.randrange(len(sent) + 1)
    inserted = random.choice((b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"}", b"\xef\xbb\xbf", b","))
    return random.choice((sent[:at], sent[:at] + inserted + sent[at:], sent[at:], sent + inserted))
