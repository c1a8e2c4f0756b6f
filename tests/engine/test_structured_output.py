"""Structured output: whatever the model would rather say, the answer has the form that was asked for.

``schemas/supported.jsonl`` has schemas of the kinds of features found in public corpora;
``schemas/unsupported.jsonl`` has what must be refused: by which keyword, at which place.
"""

from __future__ import annotations

import json
import re
import urllib.parse
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from serving.chat.reply import recognise
from serving.llamacpp.grammar import Grammar, GrammarCompiler, Matcher, prepare
from serving.llamacpp.runtime import Model
from serving.protocol.errors import ApiError
from serving.protocol.structured import ConstraintSpec, Form
from tests.processes import EngineServer

SCHEMAS = Path(__file__).with_name("schemas")
MOST_TOKENS = 400


def lines(name: str) -> list[dict[str, Any]]:
    with (SCHEMAS / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


SUPPORTED = {line["name"]: line["schema"] for line in lines("supported.jsonl")}
UNSUPPORTED = lines("unsupported.jsonl")

FORMATS = jsonschema.FormatChecker()
FORMATS.checks("date", ValueError)(lambda text: date.fromisoformat(text) is not None)
FORMATS.checks("time", ValueError)(lambda text: time.fromisoformat(text) is not None)
FORMATS.checks("date-time", ValueError)(lambda text: datetime.fromisoformat(text) is not None)
FORMATS.checks("uri")(lambda uri: bool(urllib.parse.urlsplit(uri).scheme))
FORMATS.checks("email")(lambda email: bool(re.fullmatch(r"[^@\s]+@[^@\s]+", email)))
FORMATS.checks("hostname")(
    lambda host: all(re.fullmatch(r"(?!-)[\w-]{1,63}(?<!-)", part) for part in host.split("."))
)
FORMATS.checks("duration")(
    lambda text: bool(
        re.fullmatch(r"P(?!$)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+S)?)?)", text)
    )
)


def validate(text: str, schema: dict[str, Any]) -> None:
    """By the schema's own draft, and with decimal arithmetic: 0.3 is a multiple of 0.1."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    draft = jsonschema.validators.validator_for(exact, jsonschema.Draft202012Validator)
    draft(exact, format_checker=FORMATS).validate(json.loads(text, parse_float=Decimal))


class Babbler:
    """A model that says anything at all, inclined to come to an end. It tries every corner of a grammar."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.compiler = GrammarCompiler(model)
        self._noise = np.random.default_rng(0).gumbel(size=4 * model.vocab_size).astype(np.float32)
        self._taste = np.array([self._likes(t) for t in range(model.vocab_size)], np.float32)

    def _likes(self, token: int) -> float:
        piece = self.model.piece(token)
        if self.model.ends_generation(token):
            return 6.0
        if b'"' in piece or b"}" in piece:
            return 5.0
        if piece and set(piece) <= set(b"], :0123456789"):
            return 4.0
        return 0.0

    def compile(self, kind: Form, source: str, within: str = "") -> Grammar:
        return self.compiler.compile(ConstraintSpec(kind, source, "response_format", within))

    def say(self, grammar: Grammar, seed: int) -> str | None:
        """A text of the grammar; None if it was cut off."""
        random = np.random.default_rng(seed)
        matcher = grammar.matcher()
        size = self.model.vocab_size
        said = b""
        for _ in range(MOST_TOKENS):
            start = random.integers(3 * size)
            logits = self._taste + self._noise[start : start + size]
            matcher.apply(logits)
            token = int(logits.argmax())
            assert np.isfinite(logits[token])
            matcher.accept(token)
            assert matcher.fault is None
            ended = self.model.ends_generation(token)
            said += b"" if ended else self.model.piece(token)
            if ended or matcher.stopped:
                return said.decode()
        return None


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[Model]:
    model = Model(model_path, gpu_layers=0)
    yield model
    model.close()


@pytest.fixture(scope="module")
def babbler(model: Model) -> Babbler:
    return Babbler(model)


def test_the_suite_is_large() -> None:
    assert len(SUPPORTED) >= 200


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_output_follows_its_schema(babbler: Babbler, name: str) -> None:
    schema = SUPPORTED[name]
    grammar = babbler.compile("json_schema", json.dumps(schema))
    said = [babbler.say(grammar, zlib.crc32(name.encode()) + turn) for turn in range(4)]
    complete = [text for text in said if text is not None]
    assert complete
    for text in complete:
        validate(text, schema)


@pytest.mark.parametrize("line", UNSUPPORTED, ids=lambda line: line["name"])
def test_what_is_not_supported_is_refused_by_keyword_and_place(
    babbler: Babbler, line: dict[str, Any]
) -> None:
    with pytest.raises(ApiError) as refused:
        babbler.compile("json_schema", json.dumps(line["schema"]))
    assert refused.value.status == 400
    assert refused.value.param == "response_format"
    place = "its root" if line["place"] == "root" else line["place"]
    assert f"the schema's {line['keyword']!r} at {place} " in refused.value.message


def test_the_other_keywords_of_a_refused_schema_are_not_blamed(babbler: Babbler) -> None:
    schema = {
        "type": "object",
        "title": "Thing",
        "properties": {
            "fine": {"type": "string", "maxLength": 5},
            "worse": {
                "type": "array",
                "items": {"type": "string", "pattern": "(?!a)b", "maxLength": 3},
            },
        },
    }
    with pytest.raises(ApiError, match=r"'pattern' at properties\.worse\.items .*look-around"):
        babbler.compile("json_schema", json.dumps(schema))


def chain(length: int) -> dict[str, Any]:
    """A definition that refers to the next, and so on."""
    definitions: dict[str, Any] = {
        f"d{number}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{number + 1}"}}}
        for number in range(length)
    }
    definitions[f"d{length}"] = {"type": "null"}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (chain(5000), "too many schemas to follow"),
        (nested(150), "nested too deeply"),
    ],
)
def test_schemas_that_would_overflow_the_stack_are_refused(
    babbler: Babbler, schema: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ApiError, match=reason):
        babbler.compile("json_schema", json.dumps(schema))


@pytest.mark.parametrize("schema", [chain(200), nested(60)])
def test_schemas_that_are_merely_deep_are_not(babbler: Babbler, schema: dict[str, Any]) -> None:
    babbler.compile("json_schema", json.dumps(schema))


def test_json_has_no_room_for_endless_whitespace(babbler: Babbler) -> None:
    grammar = babbler.compile("json_object", "")
    for seed in range(10):
        text = babbler.say(grammar, seed)
        if text is not None:
            json.loads(text)
            assert not re.match(r"\s|.*\s$", text)
            assert not re.search(
                r'([{\[:,"]) {2}(?=["\d{\[])', re.sub(r'"(\\.|[^"\\])*"', '""', text)
            )


FORMS: list[tuple[Form, Any, str | None]] = [
    ("regex", r"\d{3}-[a-f]+", r"[0-9]{3}-[a-f]+"),
    ("regex", r"^(yes|no)$", "yes|no"),
    ("regex", r"a\$", r"a\$"),
    ("regex", '[^\\s"]{2,4}\nend', '[^\\s"]{2,4}\nend'),
    ("choice", ["yes", "no", "not sure"], "yes|no|not sure"),
    ("choice", ['say "hi"', "back\\slash", "two\nlines", "日本 😀", "/.*/"], None),
    ("choice", ["a", "ab", "abc"], "a|ab|abc"),
    (
        "lark",
        'start: greeting " " NAME\ngreeting: "hello" | "hi"\nNAME: /[A-Z][a-z]{1,5}/',
        r"(hello|hi) [A-Z][a-z]{1,5}",
    ),
    ("lark", 'start: "(" start ")" | "x"', r"\(*x\)*"),
    ("lark", 'start: %json {"type": "integer", "minimum": 3, "maximum": 5}', "[345]"),
    (
        "lark",
        'root ::= "<" word ("," word)* ">"\nword ::= [a-c]{1,3} # three\n',
        r"<[a-c]{1,3}(,[a-c]{1,3})*>",
    ),
    ("lark", 'root ::= ("yes" | "no") [!?]', "(yes|no)[!?]"),
]


@pytest.mark.parametrize(("kind", "source", "expected"), FORMS, ids=lambda value: str(value)[:30])
def test_other_forms(babbler: Babbler, kind: Form, source: Any, expected: str | None) -> None:
    grammar = babbler.compile(kind, source if isinstance(source, str) else json.dumps(source))
    said = {babbler.say(grammar, seed) for seed in range(8)} - {None}
    assert len(said) > 1 or expected == r"a\$"
    for text in said:
        assert text is not None
        assert text in source if expected is None else re.fullmatch(expected, text)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "("),
        ("regex", "(?=a)a"),
        ("regex", r"(a)\1"),
        ("regex", "[[a]]"),
        ("regex", r"[^\s\S]"),
        ("lark", ""),
        ("lark", "just words"),
        ("lark", "start: missing"),
        ("lark", "start: a\na: start"),
        ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        ("lark", 'start: %json {"uniqueItems": true}'),
        ("lark", '{"grammars": [{"json_schema": {}}]}'),
        ("lark", 'root ::= "open'),
        ("lark", 'other ::= "no root"'),
        ("lark", 'root ::= (?=x) "a"'),
    ],
    ids=lambda value: value[:30],
)
def test_bad_forms_are_refused(babbler: Babbler, kind: Form, source: str) -> None:
    with pytest.raises(ApiError) as refused:
        babbler.compile(kind, source)
    assert refused.value.status == 400
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 700


def test_a_choice_may_be_among_very_many(babbler: Babbler) -> None:
    grammar = babbler.compile("choice", json.dumps([f"item {number}" for number in range(70_000)]))
    assert re.fullmatch(r"item \d{1,5}", babbler.say(grammar, 0) or "")


def test_a_grammar_is_compiled_once(babbler: Babbler) -> None:
    schema = json.dumps(SUPPORTED["document/person"])
    assert babbler.compile("json_schema", schema) is babbler.compile("json_schema", schema)


def allowed(matcher: Matcher, size: int) -> NDArray[np.intp]:
    logits = np.arange(size, dtype=np.float32)
    matcher.apply(logits)
    kept = np.flatnonzero(np.isfinite(logits))
    assert (logits[kept] == kept).all()
    return kept


def test_a_mask_leaves_what_is_allowed_as_it_was(babbler: Babbler) -> None:
    model = babbler.model
    matcher = babbler.compile("choice", '["yes", "yesterday"]').matcher()
    firsts = {model.piece(int(token)) for token in allowed(matcher, model.vocab_size)}
    assert firsts == {b"y", b"ye", b"yes", b"yesterday"} & firsts
    assert b"y" in firsts
    # Asking again changes nothing; only a token goes on.
    assert {model.piece(int(t)) for t in allowed(matcher, model.vocab_size)} == firsts
    for token in model.tokenize("yes", add_special=False, parse_special=False):
        matcher.accept(token)
    nexts = {int(token) for token in allowed(matcher, model.vocab_size)}
    ends = {token for token in range(model.vocab_size) if model.ends_generation(token)}
    assert ends < nexts
    assert {model.piece(token) for token in nexts - ends} <= {b"t", b"te", b"ter", b"terday"}
    assert not matcher.stopped
    for token in model.tokenize("terday", add_special=False, parse_special=False):
        matcher.accept(token)
    assert matcher.stopped
    assert matcher.fault is None


def test_masks_of_many_sequences_are_their_own(babbler: Babbler) -> None:
    model, words = babbler.model, ["apple", "banana", "cherry", "date"]
    matchers = [babbler.compile("choice", json.dumps([word])).matcher() for word in words]
    prepare(matchers)
    prepare(matchers)
    for word, matcher in zip(words, matchers, strict=True):
        pieces = [model.piece(int(token)) for token in allowed(matcher, model.vocab_size)]
        assert pieces
        assert all(word.encode().startswith(piece) for piece in pieces)


def test_a_token_that_is_not_allowed_is_a_fault(babbler: Babbler) -> None:
    matcher = babbler.compile("choice", '["yes"]').matcher()
    (token,) = babbler.model.tokenize("no", add_special=False, parse_special=False)
    matcher.accept(token)
    assert matcher.fault is not None


def test_a_copy_starts_at_the_start(babbler: Babbler) -> None:
    grammar = babbler.compile("choice", '["yes"]')
    assert babbler.say(grammar, 0) == babbler.say(grammar, 1) == "yes"


@pytest.mark.parametrize(
    ("template", "reasoning"),
    [
        ("{{ '<think>' }}{{ '</think>' }}", "I {think} so.</think>\n\n"),
        (
            "{% if tools %}{% endif %}<|channel|>final<|message|>",
            "<|channel|>analysis<|message|>I {think} so.<|end|><|start|>assistant"
            "<|channel|>final<|message|>",
        ),
    ],
    ids=["think", "harmony"],
)
def test_reasoning_is_free_and_the_answer_is_not(
    babbler: Babbler, template: str, reasoning: str
) -> None:
    model, within = babbler.model, recognise(template).before_form(thinking=True)
    matcher = babbler.compile("json_schema", '{"const": {"a": 1}}', within).matcher()
    for token in model.tokenize(reasoning, add_special=False, parse_special=False):
        assert token in allowed(matcher, model.vocab_size)
        matcher.accept(token)
    firsts = {model.piece(int(token)) for token in allowed(matcher, model.vocab_size)}
    assert firsts
    assert firsts <= {b"{", b'{"', b'{"a'}


# Over HTTP, with the real model.

CHOSEN = (
    *("type/boolean", "enum/unicode", "const/object", "integer/both", "number/multiple-cent"),
    *("pattern/phone", "format/date-time", "format/uuid", "array/of-objects", "tuple/coordinates"),
    *("draft7/tuple", "object/some-optional", "object/unicode-keys", "any-of/objects"),
    *("one-of/tagged", "all-of/extend", "ref/defs", "recursive/tree", "document/weather"),
    *("document/review", "document/pydantic", "document/tool-call"),
)
ASK: Any = [{"role": "user", "content": "Make up an example. Reply in JSON."}]


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[EngineServer]:
    with EngineServer(model_path, context_length=384, max_sequences=8, max_queue=32) as server:
        yield server


def create(server: EngineServer, **fields: Any) -> Any:
    options: dict[str, Any] = {"model": "smol", "messages": ASK, "max_tokens": 120, "seed": 3}
    return server.client.chat.completions.create(**(options | fields))


def response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }


def test_many_forms_side_by_side(server: EngineServer) -> None:
    def answer(number: int, name: str) -> tuple[str, str, str]:
        form = response_format(SUPPORTED[name])
        if number % 2:
            (choice,) = create(server, response_format=form).choices
            return name, choice.message.content, choice.finish_reason
        chunks = [c for c in create(server, response_format=form, stream=True) if c.choices]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return name, text, chunks[-1].choices[0].finish_reason

    with ThreadPoolExecutor(len(CHOSEN)) as pool:
        answers = list(pool.map(answer, *zip(*enumerate(CHOSEN), strict=True)))
    for name, text, reason in answers:
        assert reason in ("stop", "length")
        if reason == "stop":
            validate(text, SUPPORTED[name])
    assert sum(reason == "stop" for _, _, reason in answers) >= 0.8 * len(answers)


class Ticket(BaseModel):
    """What the SDK makes a strict schema of."""

    priority: Literal["low", "high"]
    due: date | None
    related: list[int] = Field(max_length=2)


def test_the_sdk_parses_answers_into_its_users_types(server: EngineServer) -> None:
    completion = server.client.chat.completions.parse(
        model="smol", messages=ASK, response_format=Ticket, max_tokens=80
    )
    assert isinstance(completion.choices[0].message.parsed, Ticket)


def test_json_object(server: EngineServer) -> None:
    (choice,) = create(server, response_format={"type": "json_object"}, max_tokens=250).choices
    assert choice.message.content.startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"regex": "[A-Z][a-z]{2,8}"}}, "[A-Z][a-z]{2,8}"),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, "red|blue"),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
        ({"guided_grammar": 'root ::= "a"{3,5}'}, "a{3,5}"),
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_json": '{"type": "boolean"}'}, "true|false"),
    ],
)
def test_vllms_names_work_on_both_endpoints(
    server: EngineServer, fields: dict[str, Any], expected: str
) -> None:
    chat = create(server, extra_body=fields).choices[0]
    text = server.client.completions.create(
        model="smol", prompt="My favourite is", max_tokens=40, extra_body=fields
    ).choices[0]
    for answer, reason in (
        (chat.message.content, chat.finish_reason),
        (text.text, text.finish_reason),
    ):
        assert re.fullmatch(expected, answer)
        assert reason == "stop"


def test_choices_and_prompts_each_follow_the_form(server: EngineServer) -> None:
    completion = server.client.completions.create(
        model="smol", prompt=["One", "Two"], n=3, max_tokens=20, temperature=2,
        extra_body={"guided_choice": ["yes", "no", "maybe"]},
    )  # fmt: skip
    assert len(completion.choices) == 6
    assert {choice.text for choice in completion.choices} <= {"yes", "no", "maybe"}


def test_logprobs_are_the_models_own(server: EngineServer) -> None:
    options: dict[str, Any] = {
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "max_tokens": 4,
    }
    free = create(server, **options).choices[0].logprobs.content[0]
    held = create(server, **options, extra_body={"guided_regex": "[0-9]{9}"}).choices[0]
    first = held.logprobs.content[0]
    assert [top.token for top in first.top_logprobs] == [top.token for top in free.top_logprobs]
    assert first.top_logprobs[0].logprob == pytest.approx(free.top_logprobs[0].logprob, abs=1e-2)
    assert first.token.isdigit()
    assert first.logprob < first.top_logprobs[0].logprob


def test_an_answer_that_is_cut_off_says_so(server: EngineServer) -> None:
    long = {"type": "array", "items": {"type": "integer"}, "minItems": 50}
    (choice,) = create(server, response_format=response_format(long), max_tokens=9).choices
    assert choice.finish_reason == "length"
    assert choice.message.content.startswith("[")


def test_a_form_ends_even_a_generation_that_ignores_the_end(server: EngineServer) -> None:
    body = {"guided_choice": ["yes"], "ignore_eos": True}
    (choice,) = create(server, extra_body=body).choices
    assert (choice.message.content, choice.finish_reason) == ("yes", "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_proves_too_large_is_the_requests_fault(
    server: EngineServer, stream: bool
) -> None:
    body = {"guided_regex": "(a{1000}){1000}"}
    with pytest.raises(openai.APIError, match="'guided_regex': cannot be enforced") as refused:
        list(create(server, extra_body=body, stream=stream))
    assert refused.value.param == "guided_regex"
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": response_format({"type": "array", "uniqueItems": True})},
            "response_format",
            "'uniqueItems' at its root is not supported",
        ),
        ({"extra_body": {"guided_json": {"not": {}}}}, "guided_json", "'not' at its root"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex", "unclosed group"),
        (
            {"extra_body": {"structured_outputs": {"grammar": "start: x"}}},
            "structured_outputs.grammar",
            "unknown name",
        ),
    ],
)
def test_refusals_reach_the_client(
    server: EngineServer, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        create(server, **fields)
    assert refused.value.param == param
