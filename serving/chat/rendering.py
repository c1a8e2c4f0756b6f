"""Chat: a request becomes a prompt and rules for its answer, generated text becomes OpenAI's deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serving.chat.reply import (
    ContentDelta,
    ReasoningDelta,
    ReplyDelta,
    ReplyFormat,
    ReplyParser,
    recognise,
)
from serving.chat.template import ChatTemplate
from serving.protocol.errors import ApiError
from serving.protocol.requests import (
    ChatCompletionRequest,
    Function,
    Message,
    TextPart,
    ToolCall,
    ToolUse,
)
from serving.protocol.responses import FinishReason, TokenLogprob
from serving.protocol.structured import ConstraintSpec


class Reply:
    """One choice on its way out. Of a text completion, what is generated is what is sent.

    ``offset`` is where the text that was pushed last begins; ``logprobs`` wait for content to go with.
    """

    def __init__(self) -> None:
        self.offset = 0
        self.logprobs: list[TokenLogprob] = []
        self._length = 0

    def push(self, text: str) -> str | dict[str, Any]:
        """What to send for new text; empty if that is not certain yet."""
        self.offset = self._length
        self._length += len(text)
        return text

    def finish(self, reason: FinishReason) -> str | dict[str, Any]:
        """What is left to send when generation has ended for ``reason``."""
        del reason
        return ""

    def reason(self, reason: FinishReason) -> FinishReason:
        """Why the choice ended, given why its generation did."""
        return reason


class ChatReply(Reply):
    """One choice of a chat completion: text is parsed into content, reasoning and calls."""

    def __init__(self, parser: ReplyParser) -> None:
        super().__init__()
        self._parser = parser

    def push(self, text: str) -> dict[str, Any]:
        return _wire(self._parser.push(text))

    def finish(self, reason: FinishReason) -> dict[str, Any]:
        return _wire(self._parser.finish(cut_off=reason == "length"))

    def reason(self, reason: FinishReason) -> FinishReason:
        return "tool_calls" if reason == "stop" and self._parser.made_tool_calls else reason


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered conversation, and how its answer is constrained and read.

    ``thinking``: it ends inside a reasoning block, so that the model begins by thinking.
    """

    text: str
    thinking: bool
    constraint: ConstraintSpec | None
    format: ReplyFormat
    functions: Sequence[Function]

    def reply(self) -> ChatReply:
        """What one choice's text goes through."""
        return ChatReply(
            self.format.parser(
                tools=bool(self.functions), thinking=self.thinking, functions=self.functions
            )
        )


class ChatRenderer:
    """Prepares conversations for a model, in the format its template gives away."""

    def __init__(self, template: ChatTemplate, token_of: Callable[[str], int | None]) -> None:
        """``token_of`` gives the id of a text that is one token, None for others."""
        self._template = template
        self._format = recognise(template.source, token_of)

    def prepare(self, request: ChatCompletionRequest) -> ChatPrompt:
        """Raises :class:`ApiError` (400) for what the template refuses or does not know."""
        use = request.tool_use
        # Calls that are constrained cannot stray to tools that are merely shown, and a prompt that
        # shows the same tools whatever the choice is found in the cache.
        shown = use.functions if use else ()
        if use and use.required:
            shown = tuple(tool.function for tool in request.tools or ())
        messages: Sequence[Message] = request.messages
        if not self._format.renders_tools:
            messages = _in_plain_words(messages)
            if shown:
                messages = self._with_instructions(messages, self._format.tool_prompt(shown))
            shown = ()
        effort = request.reasoning_effort
        if effort == "none" and self._format.reasoning is None:
            effort = None  # there is no thinking to be turned off
        text = self._template.render(
            messages,
            shown,
            reasoning_effort=effort,
            variables=request.chat_template_kwargs,
        )
        reasoning = self._format.reasoning
        thinking = reasoning is not None and text.rstrip().endswith(reasoning[0])
        return ChatPrompt(
            text=text,
            thinking=thinking,
            constraint=self._constraint(request, use, thinking),
            format=self._format,
            functions=use.functions if use else (),
        )

    def _with_instructions(self, messages: list[Message], text: str) -> list[Message]:
        """The conversation with ``text`` in its system message; in its first, if there can be none."""
        first, rest = messages[0], messages[1:]
        if first.role in ("system", "developer") or not self._template.takes_system:
            parts = first.content
            if not isinstance(parts, list):
                parts = [TextPart(type="text", text=first.text)]
            parts = [*parts, TextPart(type="text", text=f"\n\n{text}")]
            return [first.model_copy(update={"content": parts}), *rest]
        return [Message(role="system", content=text), *messages]

    def _constraint(
        self, request: ChatCompletionRequest, use: ToolUse | None, thinking: bool
    ) -> ConstraintSpec | None:
        form = request.constraint
        if use is None:
            return form and replace(form, within=self._format.before_form(thinking=thinking))
        if form is not None and not use.required:
            raise ApiError(
                400,
                f"'{form.param}' cannot be combined with tools that may be called or not; "
                "set 'tool_choice' to 'none' or 'required'.",
                param=form.param,
                code="unsupported_value",
            )
        strict = any(function.strict for function in use.functions)
        if not (use.required or strict or not use.parallel):
            return None
        source = self._format.constraint(
            use.functions, required=use.required, parallel=use.parallel, thinking=thinking
        )
        if source is None:
            asking = "tool_choice" if use.required else "tools" if strict else "parallel_tool_calls"
            raise ApiError(
                400,
                f"'{asking}': this model's way to write calls cannot be constrained; "
                "leave tools neither required nor strict, and parallel calls allowed.",
                param=asking,
                code="unsupported_value",
            )
        return ConstraintSpec("lark", source, "tools")


def _in_plain_words(messages: Sequence[Message]) -> list[Message]:
    """The conversation for a template that knows no tools: calls and their results become text."""
    turns: list[Message] = []
    after_result = False
    for message in messages:
        role, content = message.role, message.content
        if message.tool_calls:
            content = "\n".join(filter(None, (message.text, *map(_call_text, message.tool_calls))))
        elif role == "tool":
            role, content = "user", f"<tool_response>\n{message.text}\n</tool_response>"
        # Many templates want roles to alternate: results and what the user adds are one turn.
        if role == "user" and after_result and isinstance(content, str):
            content = f"{turns.pop().text}\n{content}"
        after_result = message.role == "tool"
        plain = {"role": role, "content": content, "tool_calls": None, "tool_call_id": None}
        turns.append(message.model_copy(update=plain))
    return turns


def _call_text(call: ToolCall) -> str:
    """A call as the generic format's instructions ask for it."""
    name, arguments = call.function.name, call.function.arguments
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _wire(deltas: Sequence[ReplyDelta]) -> dict[str, Any]:
    """Parts of a message as one of OpenAI's deltas."""
    wire: dict[str, Any] = {}
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            wire["content"] = wire.get("content", "") + delta.text
        elif isinstance(delta, ReasoningDelta):
            wire["reasoning_content"] = wire.get("reasoning_content", "") + delta.text
        else:
            calls = wire.setdefault("tool_calls", [])
            if delta.id is not None:
                function = {"name": delta.name, "arguments": delta.arguments}
                calls.append(
                    {
                        "index": delta.index,
                        "id": delta.id,
                        "type": "function",
                        "function": function,
                    }
                )
            elif calls and calls[-1]["index"] == delta.index:
                calls[-1]["function"]["arguments"] += delta.arguments
            else:
                calls.append({"index": delta.index, "function": {"arguments": delta.arguments}})
    return wire
