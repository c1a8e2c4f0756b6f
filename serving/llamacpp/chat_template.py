"""Chat templates: from a conversation to the prompt text that the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.protocol.errors import ApiError
from serving.protocol.requests import Message


class ChatTemplate:
    """A model's Jinja template, rendered in a sandbox with the helpers Transformers offers."""

    def __init__(
        self, source: str | None, *, bos_text: str, eos_text: str, tokenizer_adds_bos: bool
    ) -> None:
        """``source`` None stands for a model without a template: it serves text completions only."""
        self._special = {"bos_token": bos_text, "eos_token": eos_text}
        # A template that writes BOS where the tokenizer adds it too would double it.
        self._redundant_prefix = bos_text if tokenizer_adds_bos else ""
        self._template = None
        self._fault = "this model's file has no chat template"
        if source is None:
            return
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            self._fault = f"this model's chat template is broken: {error}"

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt, up to where the assistant speaks next. Raises :class:`ApiError` (400)."""
        if self._template is None:
            raise ApiError(
                400,
                f"{self._fault}; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        turns = [_turn(message) for message in messages]
        try:
            prompt = self._template.render(
                messages=turns, add_generation_prompt=True, **self._special
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ApiError(
                400,
                f"The model's chat template refuses this conversation: {error}.",
                param="messages",
                code="template_error",
            ) from error
        return prompt.removeprefix(self._redundant_prefix)


def _turn(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML characters, which would reach the model.
    return json.dumps(value, ensure_ascii=False, indent=indent)
