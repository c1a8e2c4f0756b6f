"""Writes docs/api.md from the code: `make api-docs`.

What is honoured, what is refused and why, and within which limits is read from the request types that
the server itself checks bodies with; which fields are OpenAI's, from its SDK.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args
from unittest.mock import Mock

import orjson
from openai.types import (
    batch_create_params,
    completion_create_params,
    embedding_create_params,
    file_create_params,
)
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from serving.config import ModelConfig
from serving.gateway.app import create_app
from serving.gateway.intake import Gateway
from serving.gateway.llama_server import fields as llama_server
from serving.gateway.vllm import fields as vllm
from serving.protocol.anthropic import CountTokensRequest, MessagesRequest
from serving.protocol.batches import MAX_FILE_BYTES, BatchRequest, UploadFields
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.requests import (
    ChatCompletionRequest,
    ModelRequest,
    Refusal,
    RefusedValues,
    RefusingBody,
)
from serving.protocol.structured import Body

FILE = Path(__file__).parents[1] / "docs" / "api.md"

# OpenAI's request types, as its SDK has them.
CONTRACTS: Mapping[str, tuple[type, ...]] = {
    "/v1/chat/completions": (
        chat_create_params.CompletionCreateParamsBase,
        chat_create_params.CompletionCreateParamsStreaming,
    ),
    "/v1/completions": (
        completion_create_params.CompletionCreateParamsBase,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    "/v1/embeddings": (embedding_create_params.EmbeddingCreateParams,),
    "/v1/responses": (
        response_create_params.ResponseCreateParamsBase,
        response_create_params.ResponseCreateParamsStreaming,
    ),
    "/v1/files": (file_create_params.FileCreateParams,),
    "/v1/batches": (batch_create_params.BatchCreateParams,),
}
# What engines do not see as it is; all other bodies are theirs, too.
_GATEWAYS: Mapping[str, type[Body]] = {
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/files": UploadFields,
    "/v1/batches": BatchRequest,
}
ENGINES: tuple[str, ...] = tuple(
    engine
    for kind in get_args(ModelConfig)
    for engine in get_args(kind.model_fields["engine"].annotation)
)

_ENFORCEABLE = "what can be enforced to the letter"
_REASONING = "where the model's chat template knows it"
_GRAMMAR = "as far as [its grammars](engines.md#llama_server) go"
_SEEING = "where the model has a `projector`"
# What depends on the model or on the engine's settings; the engine refuses it by name.
_CONDITIONS: Mapping[str, Mapping[str | tuple[str, str], str]] = {
    "llama_cpp": {
        "chat_template_kwargs": "variables that the model's chat template has",
        "dimensions": "up to the length of the model's vectors",
        "input[].content[].image_url": _SEEING,
        "messages[].content[].image_url": _SEEING,
        "messages[].content[].source": _SEEING,
        "messages[].content[].content[].source": _SEEING,
        "input[].output[].image_url": _SEEING,
        "guided_choice": _ENFORCEABLE,
        "guided_grammar": _ENFORCEABLE,
        "guided_json": _ENFORCEABLE,
        "guided_regex": _ENFORCEABLE,
        "output_config.effort": _REASONING,
        "output_config.format": _ENFORCEABLE,
        "n": "times prompts, up to 5 x the model's `max_sequences` + `max_queue`",
        "reasoning.effort": _REASONING,
        "reasoning_effort": _REASONING,
        "response_format": _ENFORCEABLE,
        "structured_outputs": _ENFORCEABLE,
        "suffix": "where the model was trained to fill in the middle",
        "text.format": _ENFORCEABLE,
        "thinking": _REASONING,
    },
    "llama_server": {
        **dict.fromkeys(
            (
                *("input[].content[].image_url", "input[].output[].image_url"),
                *("messages[].content[].image_url", "messages[].content[].source"),
                "messages[].content[].content[].source",
            ),
            _SEEING,
        ),
        **dict.fromkeys(("response_format", "output_config.format", "text.format"), _GRAMMAR),
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), "the prompt counts, too"),
        ("/v1/chat/completions", "logprobs"): "not in streams of requests with tools",
        ("/v1/completions", "prompt"): "one; the tokens of several are not told apart there",
        "messages[].name": "of results of tools",
        **dict.fromkeys(
            ("tools", "messages[].tool_calls"), "where the model's chat template has them"
        ),
        **dict.fromkeys(("tools[].function.strict", "tools[].strict"), "nothing but false"),
        "parallel_tool_calls": "nothing but true",
        "tool_choice": "`none`, `auto`, and `auto` among allowed tools",
    },
    "vllm": {
        **dict.fromkeys(
            (
                *("input[].content[].image_url", "input[].output[].image_url"),
                *("messages[].content[].image_url", "messages[].content[].source"),
                "messages[].content[].content[].source",
            ),
            "where the model sees images",
        ),
        **dict.fromkeys(
            (
                *("response_format", "output_config.format", "text.format", "structured_outputs"),
                *("guided_choice", "guided_grammar", "guided_json", "guided_regex"),
            ),
            "what its grammar backends take; not beside tools that may be called",
        ),
        **dict.fromkeys(
            ("reasoning_effort", "reasoning.effort", "output_config.effort", "thinking"), _REASONING
        ),
        "chat_template_kwargs": "variables that the model's chat template has",
        "dimensions": "where the model was trained for it",
        "n": "more than one where `temperature` is not 0",
        **dict.fromkeys(
            ("tools", "messages[].tool_calls"),
            "where the model's chat template has them, and there is a parser",
        ),
    },
}
# Values that ask for nothing of a field that an engine refuses.
_NOTHING: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "llama_cpp": {},
    "llama_server": llama_server.NOTHING,
    "vllm": vllm.NOTHING,
}
_ONLY_TEXT = {
    ("/tokenize", "messages[].content[].image_url"): "only text can be tokenized",
    **{
        ("/v1/messages/count_tokens", f"messages[].content[].{place}"): "only text can be tokenized"
        for place in ("source", "content[].source")
    },
}
# What an engine refuses at one endpoint, or the gateway because the engine would leave it out.
_REFUSALS: Mapping[str, Mapping[tuple[str, str], str]] = {
    "llama_cpp": _ONLY_TEXT,
    "llama_server": {
        **_ONLY_TEXT,
        **{
            (kind.path, name): reason
            for kind, refused in llama_server.REFUSED.items()
            for name, reason in refused.items()
        },
        **{
            (path, name): llama_server.REFUSED[ChatCompletionRequest]["reasoning_effort"]
            for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses")
            for name in ("thinking", "output_config.effort", "reasoning.effort")
        },
    },
    "vllm": {
        **_ONLY_TEXT,
        **{
            (kind.path, name): reason
            for kind, refused in vllm.REFUSED.items()
            for name, reason in refused.items()
        },
        **{
            ("/v1/messages/count_tokens", name): vllm.REFUSED[TokenizeRequest]["reasoning_effort"]
            for name in ("thinking", "output_config.effort")
        },
    },
}

_HEAD = """\
# The API

Written by `make api-docs` from the code; a test keeps it current. The server shows the same, to try out, at `/docs`.

A field is honoured, or the request is refused with a 400 whose `param` names the field and whose message says why; so are
fields that nobody knows. Values that ask for nothing (null, or what is listed as such) are taken. With `lenient: true`,
in the config under `server` or for one model, such fields are dropped instead, and the response header
`x-rigserve-ignored` lists them; it also lists what a model's `filters` overrule. Other headers tell [what the answer cost](cost-model.md#what-a-client-is-told).
The request headers `OpenAI-Organization`, `OpenAI-Project`, `OpenAI-Beta` and `Idempotency-Key` change nothing.
"""

_FILTERS = """\
## Filters

For each model the config may change what its engine gets, whichever API the request came by:

```yaml
models:
  - name: my-model
    lenient: true                 # drop unknown and unsupported fields; unset: as server.lenient
    filters:
      stripped: [metadata, store] # taken out before the request is checked
      defaults: {temperature: 0.7} # where the request is silent
      forced: {seed: 7}           # whatever the request says
      system_prompt: Be brief.    # before the conversation's own system message, in one message with it
      max_tokens_default: 512     # where the request is silent
      max_tokens_ceiling: 2048    # of each choice; more is cut down to it
```

A parameter applies to the endpoints that have it. One that no endpoint has, or a value that none takes, ends the start with an error
that names the key. `tool_choice` and `parallel_tool_calls` apply to requests that have tools. What a request says in vain is listed in
`x-rigserve-ignored`; for lines of batches, in their `response.headers`.
"""

_ERRORS = """\
## Errors

Every error has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and an `x-request-id`. OpenAI's SDKs turn each
status into an exception of its own, and by themselves try again after 408, 409, 429 and all from 500 up.

| status | when | |
|---|---|---|
| 400 | the body is no JSON (also NaN, halves of surrogate pairs, two fields of one name in an object, nesting too deep), or a field is missing, wrong, unknown or not supported | `param` names the field |
| 401 | the server wants an API key, and this is none of its keys | |
| 403 | the key is not for this model (`model_not_allowed`), or not for administration | |
| 404 | there is no such model, or nothing at this path | near names are listed |
| 405 | the path does not take this method | `Allow` lists those it takes |
| 408 | the body was not complete within `server.body_timeout_seconds` | the connection is closed |
| 409 | a batch has ended that is to be cancelled, or a key has a name that is taken | |
| 413 | the body is larger than `server.max_body_bytes`, or a file than 200 MB | |
| 415 | the body says it is not plain JSON in UTF-8; one without a content type is taken | |
| 429 | a limit of the key (`rate_limit_exceeded`, `insufficient_quota`) or of the client's address (`too_many_connections`) | `Retry-After`, `x-ratelimit-*`; a spent budget is not worth a retry: `x-should-retry: false` |
| 431 | the request's head is larger than `server.max_header_bytes`, or has more headers than `server.max_headers` | the connection is closed |
| 499 | the client left before its answer was complete | in the log, the ledger and metrics only |
| 500 | something failed here; the log has more under the request's id | |
| 502 | the engine gave an answer that makes no sense | |
| 503 | the model cannot start in time (`queue_full`, `deadline_unmeetable`) or at all (`model_load_failed`), its engine has stopped, the server is shutting down, has all the connections it takes, or no memory for one more request of this size (`too_many_large_requests`) | `Retry-After` |
| 504 | no connection to the engine can be made in time | |
| 507 | the disk is full on which files and batches are kept | |

A stream that fails after it has begun sends an event `{"error": {...}}`, and ends; SDKs raise it, and do not begin anew. What is no HTTP
gets a 400 of the same shape, without an id, and its connection is closed. An engine that is stuck is noticed
(`step_timeout_seconds`) and started again, which is a 503. Messages have [Anthropic's shape](messages.md#errors).
"""


def main() -> None:
    """Write the file."""
    FILE.write_text(api_docs(), encoding="utf-8")


def api_docs() -> str:
    """The text of docs/api.md."""
    # Routes are made here, and never called.
    gateway = Mock(spec=Gateway)
    gateway.router.backends = [SimpleNamespace(model=SimpleNamespace(name="smollm2-135m"))]
    app = create_app(cast(Gateway, gateway))
    paths: dict[str, dict[str, dict[str, Any]]] = app.openapi()["paths"]
    endpoints = _table(
        ("endpoint", ""),
        (
            (f"`{method.upper()} {path}`", operation.get("description", ""))
            for path, operations in paths.items()
            for method, operation in operations.items()
        ),
    )
    kinds = {**{kind.path: kind for kind in _kinds(ModelRequest)}, **_GATEWAYS}
    bodies = (_body(path, kinds[path]) for path in paths if path in kinds)
    return "\n".join([_HEAD, "## Endpoints\n", endpoints, *bodies, _FILTERS, _ERRORS])


def contract_fields(path: str) -> set[str]:
    """The names of the fields that OpenAI's request type for an endpoint has; empty if it has none."""
    return {name for part in CONTRACTS.get(path, ()) for name in part.__annotations__}


def _kinds(kind: type[ModelRequest]) -> Iterator[type[ModelRequest]]:
    for each in kind.__subclasses__():
        if "path" in each.__dict__:
            yield each
        yield from _kinds(each)


def _body(path: str, kind: type[Body]) -> str:
    openais = contract_fields(path)
    names = sorted(kind.model_fields.keys() | _refused(kind).keys())
    rows = {name: _row(path, kind, name) for name in names}
    if path == "/v1/files":
        largest = f"required; a file of at most {MAX_FILE_BYTES >> 20} MiB"
        rows = {"file": ("`file`", largest, *("honoured" for _ in ENGINES)), **rows}
    header = ("field", "takes", *(f"`{engine}`" for engine in ENGINES))
    parts = [f"## `POST {path}`\n"]
    if openais:
        theirs = [row for name, row in rows.items() if name in openais]
        ours = [row for name, row in rows.items() if name not in openais]
        parts += ["OpenAI's fields:\n", _table(header, theirs)]
        if ours:
            parts += ["Fields that OpenAI does not have:\n", _table(header, ours)]
    else:
        parts.append(_table(header, rows.values()))
    if nested := _nested(path, kind):
        parts += ["Within them:\n", _table(header, nested)]
    return "\n".join(parts)


def _refused(kind: type[BaseModel]) -> Mapping[str, Refusal]:
    return kind.refused if issubclass(kind, RefusingBody) else {}


def _refused_values(kind: type[BaseModel], name: str) -> str:
    """What is said of a field's values that are refused; empty if there are none."""
    refusal: RefusedValues | None = None
    if issubclass(kind, RefusingBody):
        refusal = kind.refused_values.get(name)
    if refusal is None:
        return ""
    values = ", ".join(f"`{_json(value)}`" for value in refusal.values)
    return f". Refused: {values} ({refusal.reason})"


def _row(path: str, kind: type[Body], name: str) -> tuple[str, ...]:
    if refusal := _refused(kind).get(name):
        nothing = " or ".join(f"`{_json(value)}`" for value in refusal.nothing)
        takes = f"nothing but {nothing}" if nothing else ""
        return (f"`{name}`", takes, *(f"refused: {refusal.reason}" for _ in ENGINES))
    schema = kind.model_json_schema()
    takes = _takes(schema["properties"][name]).removesuffix(".") + _refused_values(kind, name)
    if name in schema.get("required", ()):
        takes = f"required; {takes}"
    return (f"`{name}`", takes, *(_answer(engine, path, name) for engine in ENGINES))


def _nested(path: str, kind: type[Body]) -> list[tuple[str, ...]]:
    """Rows for what the objects in a body hold, and what they refuse."""
    schema = kind.model_json_schema()
    bodies = {body.__name__: body for body in _bodies(kind, set())}
    taken: dict[str, list[str]] = {}
    refused: dict[str, str] = {}

    def walk(at: str, part: Mapping[str, Any], within: tuple[str, ...]) -> None:
        for form in _forms(part):
            if form.get("type") == "array":
                walk(f"{at}[]", form.get("items", {}), within)
            name = str(form.get("$ref", "")).rpartition("/")[2]
            if not name or name in within:
                continue
            for field, inner in schema["$defs"][name].get("properties", {}).items():
                told = _takes(inner)
                if name in bodies:
                    told = told.removesuffix(".") + _refused_values(bodies[name], field)
                taken.setdefault(f"{at}.{field}", []).append(told)
                walk(f"{at}.{field}", inner, (*within, name))
            for field, refusal in bodies[name].refused.items() if name in bodies else ():
                refused[f"{at}.{field}"] = refusal.reason

    for field, part in schema["properties"].items():
        walk(field, part, ())
    rows = [
        (f"`{place}`", _either(forms), *(_answer(engine, path, place) for engine in ENGINES))
        for place, forms in taken.items()
    ]
    rows += [
        (f"`{place}`", "", *(f"refused: {reason}" for _ in ENGINES))
        for place, reason in refused.items()
        if place not in taken
    ]
    return rows


def _bodies(annotation: Any, found: set[type[RefusingBody]]) -> set[type[RefusingBody]]:
    """The types of objects with refused fields that a field's type, or an object's fields, are made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if issubclass(annotation, RefusingBody):
            found.add(annotation)
        for field in annotation.model_fields.values():
            _bodies(field.annotation, found)
    for part in get_args(annotation):
        _bodies(part, found)
    return found


def _answer(engine: str, path: str, field: str) -> str:
    if reason := _REFUSALS[engine].get((path, field)):
        nothing = _NOTHING[engine].get(field, ())
        unless = f" unless `{_json(nothing[0])}`" if nothing else ""
        return f"refused{unless}: {reason}"
    conditions = _CONDITIONS[engine]
    condition = conditions.get((path, field)) or conditions.get(field)
    return f"honoured: {condition}" if condition else "honoured"


def _forms(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The forms that a value may have, without null."""
    forms = part.get("anyOf") or part.get("oneOf") or [part]
    if forms == [part]:
        return [part]
    return [each for form in forms for each in _forms(form) if each.get("type") != "null"]


def _takes(part: Mapping[str, Any]) -> str:
    text = _either(_form(form) for form in _forms(part))
    return f"{text}. {part['description']}" if "description" in part else text


def _either(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def _form(form: Mapping[str, Any]) -> str:
    if "$ref" in form:
        return "an object, below"
    for key in ("enum", "const"):
        if key in form:
            values = form[key] if key == "enum" else [form[key]]
            return ", ".join(f"`{_json(value)}`" for value in values)
    kind = form.get("type")
    if kind == "array":
        items = _either(_form(each) for each in _forms(form.get("items", {})))
        limits = _between(form.get("minItems"), form.get("maxItems"), "items")
        return f"a list{limits} of: {items}"
    if kind == "string":
        pattern = f" like `{form['pattern']}`" if "pattern" in form else ""
        return (
            f"text{pattern}{_between(form.get('minLength'), form.get('maxLength'), 'characters')}"
        )
    if kind in ("integer", "number"):
        low = (
            f"above {form['exclusiveMinimum']}"
            if "exclusiveMinimum" in form
            else form.get("minimum")
        )
        word = "a whole number" if kind == "integer" else "a number"
        return f"{word}{_between(low, form.get('maximum'), '')}"
    return {"boolean": "true or false", "object": "an object"}.get(str(kind), "anything")


def _between(low: object, high: object, unit: str) -> str:
    if low is None and high is None:
        return ""
    if isinstance(low, str):
        text = low if high is None else f"{low}, at most {high}"
    elif high is None:
        text = f"at least {low}"
    elif low is None:
        text = f"at most {high}"
    else:
        text = f"{low} to {high}"
    return f" ({text} {unit}".rstrip() + ")"


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in row)} |" for row in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    main()
