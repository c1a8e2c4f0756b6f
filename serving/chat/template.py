"""Chat templates: from a conversation to the prompt text that the model was trained on."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from serving.protocol.errors import ApiError
from serving.protocol.requests import Function, FunctionCall, Message, ToolCall

# Far more than a real conversation needs: they end templates that would not end by themselves.
_MOST_SECONDS = 5.0
_MOST_CHARACTERS = 50_000_000

_TICK = "__tick"
_OWN_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"))
_THINKING_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What OpenAI's format leaves open, and a template may want otherwise."""

    content_in_parts: bool = False
    arguments_as_text: bool = False
    no_content: str | None = ""
    short_ids: bool = False


class ChatTemplate:
    """A model's Jinja template, rendered in a sandbox with the helpers Transformers offers."""

    def __init__(
        self, source: str | None, *, bos_text: str, eos_text: str, tokenizer_adds_bos: bool
    ) -> None:
        """``source`` None stands for a model without a template: it serves text completions only."""
        self.source = source
        self._special = {"bos_token": bos_text, "eos_token": eos_text}
        # A template that writes BOS where the tokenizer adds it too would double it.
        self._redundant_prefix = bos_text if tokenizer_adds_bos else ""
        self._template = None
        self._variables: frozenset[str] = frozenset()
        self._fault = "this model's file has no chat template"
        if source is None:
            return
        # Templates may change lists, as Kimi's does: those they are given are made for one rendering.
        environment = SandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            tree = environment.parse(source)
            self._variables = frozenset(meta.find_undeclared_variables(tree)) - _OWN_VARIABLES
            _count_iterations(tree, environment)
            self._template = environment.template_class.from_code(
                environment, environment.compile(tree), environment.make_globals(None)
            )
        except TemplateSyntaxError as error:
            self._fault = f"this model's chat template is broken: {error}"

    def render(
        self,
        messages: Sequence[Message],
        functions: Sequence[Function] = (),
        *,
        reasoning_effort: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, up to where the assistant speaks next. Raises :class:`ApiError` (400)."""
        if self._template is None:
            raise ApiError(
                400,
                f"{self._fault}; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        chosen = {**self._effort(reasoning_effort), **self._checked(variables or {})}
        try:
            return self._render(messages, functions, self._dialect, chosen)
        except Exception as error:
            # Templates are other people's programs: whatever they raise, the engine goes on.
            raise ApiError(
                400,
                f"The model's chat template refuses this conversation: {error}.",
                param="messages",
                code="template_error",
            ) from error

    @cached_property
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system message."""
        system = Message(role="system", content=_NEEDLES[1])
        return self._speaks((system, _PROBE[0]), self._dialect)

    def _effort(self, effort: str | None) -> dict[str, Any]:
        """``reasoning_effort`` in the words of this template: a level, a switch, or both."""
        if effort is None:
            return {}
        switches = [name for name in _THINKING_SWITCHES if name in self._variables]
        known: dict[str, Any] = dict.fromkeys(switches, effort != "none")
        if "reasoning_effort" in self._variables and (effort != "none" or not switches):
            known["reasoning_effort"] = effort
        if not known:
            raise ApiError(
                400,
                "'reasoning_effort' means nothing to this model's chat template; leave it out.",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        return known

    def _checked(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in variables:
            if name not in self._variables:
                raise ApiError(
                    400,
                    f"'chat_template_kwargs.{name}' means nothing to this model's chat template.",
                    param=f"chat_template_kwargs.{name}",
                    code="unsupported_parameter",
                )
        return variables

    def _render(
        self,
        messages: Sequence[Message],
        functions: Sequence[Function],
        dialect: _Dialect,
        variables: Mapping[str, Any],
    ) -> str:
        assert self._template is not None
        deadline = time.monotonic() + _MOST_SECONDS

        def tick() -> None:
            if time.monotonic() > deadline:
                raise TemplateError(f"it is not done after {_MOST_SECONDS:g} seconds")

        pieces, length = [], 0
        for piece in self._template.generate(
            messages=self._turns(messages, dialect),
            tools=[_tool(function) for function in functions] or None,
            add_generation_prompt=True,
            **self._special,
            **variables,
            **{_TICK: tick},
        ):
            pieces.append(piece)
            length += len(piece)
            if length > _MOST_CHARACTERS:
                raise TemplateError(f"it makes more than {_MOST_CHARACTERS} characters of it")
        return "".join(pieces).removeprefix(self._redundant_prefix)

    def _turns(self, messages: Sequence[Message], dialect: _Dialect) -> list[dict[str, Any]]:
        names: dict[str | None, str] = {}
        turns = []
        for message in messages:
            turn: dict[str, Any] = {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text,
            }
            if dialect.content_in_parts:
                turn["content"] = [{"type": "text", "text": message.text}]
            if message.tool_calls:
                names |= {call.id: call.function.name for call in message.tool_calls}
                turn["tool_calls"] = [_call(call, dialect) for call in message.tool_calls]
                if not message.text:
                    turn["content"] = dialect.no_content
            if message.tool_call_id is not None:
                turn["tool_call_id"] = _call_id(message.tool_call_id, dialect)
            if name := message.name or names.get(message.tool_call_id):
                turn["name"] = name
            if message.reasoning_content:
                turn["reasoning_content"] = message.reasoning_content
                # gpt-oss reads it by this name, and only where it led to calls.
                if message.tool_calls and not message.text:
                    turn["thinking"] = message.reasoning_content
            turns.append(turn)
        return turns

    @cached_property
    def _dialect(self) -> _Dialect:
        """The first dialect in which the template renders a conversation with a call completely."""
        parts = not self._speaks(_PROBE[:1], _Dialect()) and self._speaks(
            _PROBE[:1], _Dialect(content_in_parts=True)
        )
        dialects = (
            _Dialect(parts, as_text, no_content, short_ids)
            for short_ids, no_content, as_text in itertools.product(
                (False, True), (None, ""), (False, True)
            )
        )
        fitting = (dialect for dialect in dialects if self._speaks(_PROBE, dialect))
        return next(fitting, _Dialect(parts))

    def _speaks(self, conversation: Sequence[Message], dialect: _Dialect) -> bool:
        functions = (_PROBE_FUNCTION,) if conversation is _PROBE else ()
        try:
            text = self._render(conversation, functions, dialect, {})
        except Exception:
            return False
        needles = _NEEDLES if len(conversation) > 1 else _NEEDLES[:1]
        # Python's way to write None, lists and dictionaries shows that a value was not expected.
        return all(needle in text for needle in needles) and not any(
            sign in text for sign in ("None", f"'{needles[-1]}'")
        )


_NEEDLES = ("probe_question", "probe_value")
_PROBE_FUNCTION = Function(
    name="probe_function",
    description="probe",
    parameters={"type": "object", "properties": {"probe_argument": {"type": "string"}}},
)
_PROBE = (
    Message(role="user", content=_NEEDLES[0]),
    Message(
        role="assistant",
        tool_calls=[
            ToolCall(
                id="call_0123456789abcdef",
                function=FunctionCall(
                    name="probe_function", arguments=f'{{"probe_argument": "{_NEEDLES[1]}"}}'
                ),
            )
        ],
    ),
    Message(role="tool", tool_call_id="call_0123456789abcdef", content="probe_result"),
)


def _tool(function: Function) -> dict[str, Any]:
    described = {"name": function.name, "description": function.description or ""}
    parameters = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": {**described, "parameters": parameters}}


def _call(call: ToolCall, dialect: _Dialect) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    if not dialect.arguments_as_text:
        # What is not JSON the model wrote so, and may see again.
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": _call_id(call.id, dialect), "type": "function", "function": function}


def _call_id(call_id: str, dialect: _Dialect) -> str:
    # Mistral's templates take ids of nine characters only.
    return call_id[-9:] if dialect.short_ids else call_id


def _count_iterations(tree: nodes.Template, environment: Environment) -> None:
    """Have every turn of a loop and every call of a macro call the variable ``_TICK``."""
    loops: Iterator[nodes.For | nodes.Macro] = itertools.chain(
        tree.find_all(nodes.For), tree.find_all(nodes.Macro)
    )
    for node in loops:
        tick = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        statement = nodes.ExprStmt(tick).set_lineno(node.lineno)
        node.body.insert(0, statement.set_environment(environment))


class _GenerationTag(Extension):
    """``{% generation %}`` marks what to train on; a prompt just holds what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would reach the model.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
