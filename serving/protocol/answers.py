"""JSON schemas of what the APIs answer, for their OpenAPI document: the fields that are always there.

The bodies themselves are made field by field where they arise; tests hold them against these.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_ANY: Schema = {}


def _object(**properties: Schema) -> Schema:
    """An object with these fields, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _only(value: str) -> Schema:
    return {"type": "string", "const": value}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_USAGE = _object(prompt_tokens=_WHOLE, completion_tokens=_WHOLE, total_tokens=_WHOLE)
_INPUT_USAGE = _object(prompt_tokens=_WHOLE, total_tokens=_WHOLE)
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_COMPLETION = {"id": _TEXT, "created": _WHOLE, "model": _TEXT, "usage": _USAGE}

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))
    ),
    "MessageError": _object(
        type=_only("error"), error=_object(type=_TEXT, message=_TEXT), request_id=_TEXT
    ),
    "ChatCompletion": _object(
        object=_only("chat.completion"),
        choices=_list(
            _object(
                index=_WHOLE,
                message=_object(role=_only("assistant"), content=_or_null(_TEXT)),
                finish_reason=_FINISH,
                logprobs=_or_null(_object(content=_ANY)),
            )
        ),
        **_COMPLETION,
    ),
    "Completion": _object(
        object=_only("text_completion"),
        choices=_list(_object(index=_WHOLE, text=_TEXT, finish_reason=_FINISH)),
        **_COMPLETION,
    ),
    "Embeddings": _object(
        object=_only("list"),
        model=_TEXT,
        data=_list(
            _object(
                object=_only("embedding"),
                index=_WHOLE,
                embedding={"anyOf": [_list(_NUMBER), _TEXT]},
            )
        ),
        usage=_INPUT_USAGE,
    ),
    "Ranking": _object(
        id=_TEXT,
        model=_TEXT,
        results=_list(_object(index=_WHOLE, relevance_score=_NUMBER)),
        usage=_INPUT_USAGE,
    ),
    "Tokens": _object(tokens=_list(_WHOLE), count=_WHOLE, max_model_len=_WHOLE),
    "Text": _object(prompt=_TEXT),
    "Response": _object(
        id=_TEXT,
        object=_only("response"),
        created_at=_WHOLE,
        status={
            "enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
        },
        model=_TEXT,
        output=_list(_object(type=_TEXT)),
        error=_or_null(_object(code=_TEXT, message=_TEXT)),
        usage=_or_null(_object(input_tokens=_WHOLE, output_tokens=_WHOLE, total_tokens=_WHOLE)),
    ),
    "Message": _object(
        id=_TEXT,
        type=_only("message"),
        role=_only("assistant"),
        model=_TEXT,
        content=_list(_object(type=_TEXT)),
        stop_reason=_or_null(_TEXT),
        usage=_object(input_tokens=_WHOLE, output_tokens=_WHOLE),
    ),
    "MessageTokens": _object(input_tokens=_WHOLE),
    "Model": _object(id=_TEXT, object=_only("model"), created=_WHOLE, owned_by=_TEXT),
    "Models": _object(object=_only("list"), data=_list(_named("Model"))),
    "List": _object(object=_only("list"), data=_list(_object())),
    "Page": _object(
        object=_only("list"),
        data=_list(_object(id=_TEXT)),
        first_id=_or_null(_TEXT),
        last_id=_or_null(_TEXT),
        has_more=_FLAG,
    ),
    "File": _object(
        id=_TEXT,
        object=_only("file"),
        bytes=_WHOLE,
        created_at=_WHOLE,
        filename=_TEXT,
        purpose=_TEXT,
    ),
    "Batch": _object(
        id=_TEXT,
        object=_only("batch"),
        endpoint=_TEXT,
        input_file_id=_TEXT,
        status=_TEXT,
        created_at=_WHOLE,
        request_counts=_object(total=_WHOLE, completed=_WHOLE, failed=_WHOLE),
    ),
    "Deleted": _object(id=_TEXT, object=_TEXT, deleted=_FLAG),
    "Health": _object(status=_only("ok")),
    "Ready": _object(ready=_FLAG, models={"type": "object", "additionalProperties": _TEXT}),
    "Key": _object(object=_only("key"), id=_TEXT, name=_TEXT, state=_TEXT, is_admin=_FLAG),
    "Engine": _object(
        id=_TEXT, object=_only("rigserve.engine"), state=_TEXT, in_flight=_WHOLE, waiting=_WHOLE
    ),
    "Adapter": _object(
        id=_TEXT,
        object=_only("rigserve.adapter"),
        parent=_TEXT,
        path=_TEXT,
        state=_TEXT,
        in_flight=_WHOLE,
    ),
    "Reload": _object(
        file=_TEXT,
        reloading=_FLAG,
        file_changed=_FLAG,
        ok=_FLAG,
        message=_or_null(_TEXT),
        changes=_object(),
    ),
}
