"""Structured output: the ways a request can say what form its answer must have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json

from serving.protocol.errors import conflict

_Item = TypeVar("_Item")
# Only the first bad item is an error: a large body could hold millions of them.
ListOf = Annotated[list[_Item], Field(fail_fast=True)]
Form = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class ConstraintSpec:
    """A form that generated text must have; ``param`` is the request's field that asks for it.

    ``within`` is empty, or the Lark grammar of a whole text in which ``@form`` stands for it.
    ``source`` is JSON (a schema, a list of choices), a regular expression, or a grammar in
    llguidance's Lark or llama.cpp's GBNF; for ``json_object`` it means nothing.
    """

    kind: Form
    source: str
    param: str
    within: str = ""


def _is_schema(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(value, str) and not isinstance(from_json(value, allow_inf_nan=False), dict):
        raise ValueError("the schema must be a JSON object")
    return value


def _are_choices(value: list[str]) -> list[str]:
    if not value or not all(value):
        raise ValueError("there must be a choice, and no choice may be empty")
    return value


_Schema = Annotated[str | dict[str, Any], AfterValidator(_is_schema)]
_Choices = Annotated[ListOf[str], AfterValidator(_are_choices)]


class Body(BaseModel):
    """A JSON object of a request: fields it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class JsonSchema(Body):
    """A schema and its name. It is enforced whether or not that is asked for by ``strict``."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_when_needed(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise conflict("json_schema", "needed with type 'json_schema', and only there")
        return self

    @property
    def constraint(self) -> ConstraintSpec | None:
        """What it asks for; None if any text will do."""
        if self.type == "text":
            return None
        schema = self.json_schema and self.json_schema.json_schema
        if schema is None:
            return ConstraintSpec("json_object", "", "response_format")
        return _spec("json_schema", schema, "response_format")


class StructuredOutputs(Body):
    """vLLM's way: one of these."""

    json_schema: _Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None


class StructuredRequest(Body):
    """The fields that ask for structured output, of any request for text: vLLM's, new and old."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: _Schema | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_form_at_most(self) -> Self:
        specs = self._constraints()
        if len(specs) > 1:
            first, second = specs[0].param, specs[1].param
            raise conflict(second, f"'{second}' and '{first}' exclude each other; send one of them")
        return self

    @property
    def constraint(self) -> ConstraintSpec | None:
        """The form the text must have; None if it is free."""
        return next(iter(self._constraints()), None)

    def _constraints(self) -> list[ConstraintSpec]:
        outputs = self.structured_outputs or StructuredOutputs()
        asked: list[tuple[Form, object, str]] = [
            ("json_schema", outputs.json_schema, "structured_outputs.json"),
            ("json_object", outputs.json_object or None, "structured_outputs.json_object"),
            ("regex", outputs.regex, "structured_outputs.regex"),
            ("choice", outputs.choice, "structured_outputs.choice"),
            ("lark", outputs.grammar, "structured_outputs.grammar"),
            ("json_schema", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", self.guided_choice, "guided_choice"),
            ("lark", self.guided_grammar, "guided_grammar"),
        ]
        return [_spec(kind, value, param) for kind, value, param in asked if value is not None]


def _spec(kind: Form, value: object, param: str) -> ConstraintSpec:
    return ConstraintSpec(kind, value if isinstance(value, str) else json.dumps(value), param)
