"""Which format a model replies in, recognised from its chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving.chat.reply.calls import CallSyntax, GemmaCalls, JsonCalls, NamedCalls, XmlCalls
from serving.chat.reply.harmony import Harmony
from serving.chat.reply.lark import Lark, Tokens, parameters
from serving.chat.reply.parser import ReplyParser, read_reply
from serving.protocol.requests import Function


def _no_tokens(_: str) -> int | None:
    return None


_TOOL_RULES = """# Tools

You may call one or more functions. Their signatures, within <tools></tools> tags:
<tools>
{}
</tools>

For each function call, reply with a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class ReplyFormat:
    """How a family of models writes reasoning and calls.

    ``renders_tools``: its chat template describes the tools; if not, a system message must, with
    :meth:`tool_prompt`. ``show_control_tokens``: tags may be control tokens, which must be kept.
    """

    name: str
    syntax: CallSyntax | Harmony
    show_control_tokens: bool = True
    renders_tools: bool = True
    reasoning: tuple[str, str] | None = None
    tokens: Tokens = _no_tokens

    def parser(
        self, *, tools: bool, thinking: bool, functions: Sequence[Function] = ()
    ) -> ReplyParser:
        """A parser of one reply. ``thinking``: the prompt has opened the reasoning block already."""
        syntax = self.syntax
        if isinstance(syntax, Harmony):
            return ReplyParser(lambda text: syntax.read_reply(text, tools=tools))
        return ReplyParser(
            lambda text: read_reply(
                text, syntax if tools else None, functions, self.reasoning, thinking
            )
        )

    def constraint(
        self,
        functions: Sequence[Function],
        *,
        required: bool,
        parallel: bool,
        thinking: bool = False,
    ) -> str:
        """A Lark grammar of replies whose calls are valid, for llguidance.

        ``required``: a reply is calls, after its reasoning; otherwise it may be text, too.
        ``parallel``: there may be several calls. Raises :class:`ApiError` (400) for parameters
        that a call cannot be held to.
        """
        lark = Lark(self.tokens)
        if isinstance(self.syntax, Harmony):
            return self.syntax.constraint(lark, functions, required=required)
        opener, separator = self.syntax.openers[0], self.syntax.separator
        block = lark.rule(self.syntax.block(lark, functions, several=parallel))
        again = parallel and separator is not None
        if required:
            call = f"{lark.text(opener)} {block}"
            start = f"{call} ({lark.text(separator or '')} {call})*" if again else call
        elif opener:
            call = f"{lark.until(opener)} {block}"
            start = f"({call})* TEXT" if again else f"({call} | TEXT)"
        else:
            start = rf"({block} | /(\s*[^\s{{](?s:.*))?/)"
        return lark.finish(f"{self._reasoning_first(lark, thinking)} {start}")

    def before_form(self, *, thinking: bool) -> str:
        """A Lark grammar of reasoning and then ``@form``; empty if there is no reasoning."""
        lark = Lark(self.tokens)
        if isinstance(self.syntax, Harmony):
            return self.syntax.before_form(lark)
        reasoning = self._reasoning_first(lark, thinking)
        return lark.finish(f"{reasoning} @form") if reasoning else ""

    def _reasoning_first(self, lark: Lark, thinking: bool) -> str:
        if self.reasoning is None:
            return ""
        opened, closed = self.reasoning
        rest = rf"{lark.until(closed)} /\n{{0,2}}/"
        return rest if thinking else f"({lark.text(opened)} {rest})?"

    def tool_prompt(self, functions: Sequence[Function]) -> str:
        """What a system message says about the tools and how to call them."""
        described = (
            {"name": each.name, "description": each.description, "parameters": parameters(each)}
            for each in functions
        )
        return _TOOL_RULES.format(
            "\n".join(json.dumps(each, ensure_ascii=False) for each in described)
        )


_HERMES = JsonCalls(("<tool_call>",), "</tool_call>", separator="\n", margin="\n")
_DEEPSEEK = NamedCalls(
    call="<｜tool▁call▁begin｜>",
    after_name="<｜tool▁sep｜>",
    close="<｜tool▁call▁end｜>",
    section="<｜tool▁calls▁begin｜>",
    section_close="<｜tool▁calls▁end｜>",
)
_DEEPSEEK_R1 = replace(
    _DEEPSEEK,
    call="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    after_name="\n```json\n",
    close="\n```<｜tool▁call▁end｜>",
)
_MISTRAL = NamedCalls(call="[TOOL_CALLS]", after_name="[ARGS]", call_id="[CALL_ID]")

# The first whose pattern is found in a template that describes tools.
_FORMATS = (
    (r"<\|channel\|>[\s\S]*<\|message\|>", ReplyFormat("harmony", Harmony())),
    (r"<\|tool_call>call:", ReplyFormat("gemma4", GemmaCalls())),
    (
        r"<tool_call>[\s\S]*<function=[\s\S]*<parameter=",
        ReplyFormat("qwen_coder", XmlCalls("<tool_call>", "</tool_call>")),
    ),
    # Apriel's tag, in the plural, is another syntax.
    (
        r'\A(?![\s\S]*<tool_calls>)[\s\S]*<tool_call>[\s\S]*\{\\?"name\\?": ',
        ReplyFormat("hermes", _HERMES),
    ),
    (r"\[TOOL_CALLS\][\s\S]*\[CALL_ID\][\s\S]*\[ARGS\]", ReplyFormat("mistral_id", _MISTRAL)),
    (r"\[TOOL_CALLS\][\s\S]*\[ARGS\]", ReplyFormat("mistral", replace(_MISTRAL, call_id=""))),
    (
        r"\[TOOL_CALLS\]",
        ReplyFormat("mistral_list", JsonCalls(("[TOOL_CALLS]",), in_list=True)),
    ),
    (r"tool▁calls▁begin[\s\S]*```json", ReplyFormat("deepseek_r1", _DEEPSEEK_R1)),
    (r"tool▁calls▁begin", ReplyFormat("deepseek", _DEEPSEEK)),
    (
        r'Environment: ipython[\s\S]*"parameters": ',
        ReplyFormat("llama3", JsonCalls(("", "<|python_tag|>"), ";", arguments="parameters")),
    ),
)
# Models that know no tools are told a syntax, and still write JSON their own way now and then.
_GENERIC = ReplyFormat(
    "generic",
    replace(_HERMES, openers=("<tool_call>", "```json", "```tool_code", "")),
    show_control_tokens=False,
    renders_tools=False,
)
_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


def recognise(template_source: str | None, tokens: Tokens = _no_tokens) -> ReplyFormat:
    """The format of a model with this chat template, or else the generic one.

    ``tokens`` gives the ids of tags that are tokens, which a constraint must force as such.
    """
    source = template_source or ""
    reasoning = next((tags for tags in _REASONING if tags[0] in source), None)
    found = _GENERIC
    if re.search(r"{[{%][^}]*\btools\b", source):
        found = next((form for pattern, form in _FORMATS if re.search(pattern, source)), found)
    return replace(found, reasoning=reasoning, tokens=tokens)
