"""Reads answers as strictly as the types of the SDKs allow, which the SDKs themselves do not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pydantic
import requests

# What rigserve adds to OpenAI's types, as others do (docs/clients.md); and what OpenAI's own server
# tells of a response, though its SDK does not declare it.
EXTRAS = frozenset({"reasoning_content", "stop_reason", "timings"} | {"store"})


def strictly(kind: Any, text: str | bytes) -> Any:
    """``text`` as a ``kind``: every value of its declared type, no field unknown, and none lost on the way."""
    parsed = _adapter(kind).validate_json(text, strict=True)
    unknown = set(_unknown_fields(parsed, "")) - EXTRAS
    assert not unknown, f"not in {kind}: {unknown}"
    assert parsed.to_dict(mode="json") == json.loads(text)
    return parsed


def stream_of(answer: requests.Response) -> list[bytes]:
    """The data of a stream's events, without the ``[DONE]`` which is the last."""
    *data, last = events_of(answer)
    assert last == b"[DONE]"
    return data


def events_of(answer: requests.Response) -> list[bytes]:
    """The data of a stream's events."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.content.split(b"\n")
    return [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]


@cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _unknown_fields(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or ()
        for field in value.model_fields_set & type(value).model_fields.keys():
            yield from _unknown_fields(getattr(value, field), field)
    elif isinstance(value, list):
        for each in value:
            yield from _unknown_fields(each, name)
