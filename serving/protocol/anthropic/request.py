"""What Anthropic's Messages API is asked for, and the chat completion that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from serving.protocol.anthropic.blocks import (
    CacheControl,
    Text,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
    by_type,
    conversation,
)
from serving.protocol.embeddings import TokenizeRequest
from serving.protocol.errors import conflict, unsupported
from serving.protocol.requests import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    MAX_TOOLS,
    ChatCompletionRequest,
    Refusal,
    RefusingBody,
    validated,
)
from serving.protocol.structured import Body, ListOf

_MAX_INT32 = 2**31 - 1
# Anthropic's own.
_LEAST_BUDGET_TOKENS = 1024
# Up to how many tokens a budget for thinking stands for which effort; larger ones for a high effort.
_EFFORTS = ((4096, "low"), (16384, "medium"))

Effort = Literal["low", "medium", "high", "xhigh", "max"]


class Tool(RefusingBody):
    """A tool that the client runs."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "allowed_callers": Refusal("only the model itself calls tools here", (["direct"],)),
        "defer_loading": Refusal(
            "there is no search for tools; the model sees all of them", (False,)
        ),
        "eager_input_streaming": Refusal(
            "a call's input is always streamed as it is written", (True,)
        ),
        "input_examples": Refusal("chat templates have no place for them", ([],)),
    }

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = Field(None, description="Calls must follow 'input_schema' exactly.")
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            raise unsupported(
                "type",
                f"{str(kind)[:64]!r} is one of Anthropic's own tools, which models here do not know; "
                "describe a tool of your own, with an input_schema",
                tells_kind=True,
            )
        return value

    @model_validator(mode="after")
    def _inputs_have_names(self) -> Self:
        if self.input_schema.get("type", "object") != "object":
            raise conflict("input_schema", "the schema's type must be 'object': inputs have names")
        return self

    @property
    def function(self) -> dict[str, Any]:
        """The same in a chat."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": function}


class ToolChoice(Body):
    """Whether a tool may or must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _fields_suit_the_type(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise conflict("name", "needed with type 'tool', and only there")
        if self.type == "none" and self.disable_parallel_tool_use is not None:
            raise conflict("disable_parallel_tool_use", "with type 'none' nothing is called at all")
        return self

    @property
    def choice(self) -> str | dict[str, Any]:
        """The same in a chat."""
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class _ShownThinking(RefusingBody):
    refused: ClassVar[Mapping[str, Refusal]] = {
        "display": Refusal(
            "thinking is shown as it is: nothing here hides it and could find it again",
            ("summarized",),
        )
    }


class ThinkingEnabled(_ShownThinking):
    """Think first. No engine stops thinking at a number of tokens: the budget stands for an effort."""

    type: Literal["enabled"]
    budget_tokens: int = Field(ge=_LEAST_BUDGET_TOKENS, le=_MAX_INT32)

    @property
    def effort(self) -> str:
        """How hard to think."""
        return next((name for most, name in _EFFORTS if self.budget_tokens <= most), "high")


class ThinkingAdaptive(_ShownThinking):
    """Think if the model wants to, which is what it does when it is not told."""

    type: Literal["adaptive"]


class ThinkingDisabled(Body):
    """Do not think."""

    type: Literal["disabled"]


Thinking = Annotated[
    Annotated[ThinkingEnabled, Tag("<enabled>")]
    | Annotated[ThinkingAdaptive, Tag("<adaptive>")]
    | Annotated[ThinkingDisabled, Tag("<disabled>")],
    Discriminator(
        by_type,
        custom_error_type="thinking",
        custom_error_message="the type must be 'enabled', 'disabled' or 'adaptive'",
    ),
]


class OutputFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """The answer's form, and how hard to think about it."""

    effort: Effort | None = None
    format: OutputFormat | None = None


class Metadata(Body):
    """``user_id`` is who waits in line, and whose usage it is in the ledger."""

    user_id: str | None = Field(None, max_length=256)


class CountTokensRequest(RefusingBody):
    """Body of ``POST /v1/messages/count_tokens``: a conversation."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "billing_policy": Refusal("nothing is billed here"),
        "compaction": Refusal(
            "conversations are not shortened here; send what the model should see"
        ),
        "context_management": Refusal(
            "conversations are not edited here; send what the model should see",
            ({}, {"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
        ),
        "mcp_servers": Refusal(
            "nothing here calls MCP servers; offer their tools in 'tools'", ([],)
        ),
        "output_format": Refusal("Anthropic has replaced it by 'output_config.format'; send that"),
        "speed": Refusal("every request is served as fast as the engine can", ("standard",)),
        "user_profile_id": Refusal("there are no such profiles here; send 'metadata.user_id'"),
        "workspace_id": Refusal(
            "there are no workspaces here; the API key says whose a request is"
        ),
    }

    model: str = Field(min_length=1, max_length=256)
    messages: ListOf[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text | None = None
    tools: ListOf[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="after")
    def _user_speaks_last(self) -> Self:
        if self.messages[-1].role == "assistant":
            where = f"messages[{len(self.messages) - 1}].role"
            raise conflict(
                where,
                f"'{where}': no answer can be begun for the model; the last turn is the user's",
            )
        return self

    @model_validator(mode="after")
    def _results_answer_calls(self) -> Self:
        called: set[str] = set()
        answered: set[str] = set()
        for number, turn in enumerate(self.messages):
            for index, block in enumerate(turn.blocks):
                where = f"messages[{number}].content[{index}]"
                if isinstance(block, ToolUseBlock):
                    if block.id in called:
                        raise conflict(f"{where}.id", f"'{where}.id' is another call's, too")
                    called.add(block.id)
                elif isinstance(block, ToolResultBlock):
                    where = f"{where}.tool_use_id"
                    if block.tool_use_id not in called:
                        raise conflict(where, f"'{where}' is that of no call in an earlier message")
                    if block.tool_use_id in answered:
                        raise conflict(where, f"'{where}': this call has another result already")
                    answered.add(block.tool_use_id)
        return self

    @property
    def chat(self) -> ChatCompletionRequest:
        """The chat completion that answers it; raises :class:`ApiError` (400)."""
        fields = {name: value for name, value in self._chat_fields().items() if value is not None}
        return validated(ChatCompletionRequest, fields)

    @property
    def tokenization(self) -> TokenizeRequest:
        """What is asked to count the tokens of its prompt; raises :class:`ApiError` (400)."""
        chat = self.chat
        return TokenizeRequest(
            model=chat.model,
            messages=chat.messages,
            tools=None if chat.tool_choice == "none" else chat.tools,
            reasoning_effort=chat.reasoning_effort,
        )

    def _chat_fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        serial = choice is not None and choice.disable_parallel_tool_use
        return {
            "model": self.model,
            "messages": conversation([*self._introduction, *self.messages]),
            "tools": [tool.function for tool in self.tools or ()] or None,
            "tool_choice": choice and choice.choice,
            "parallel_tool_calls": False if serial else None,
            "reasoning_effort": self._effort,
            "response_format": self._response_format,
        }

    @property
    def _introduction(self) -> list[Turn]:
        if not self.system:
            return []
        if isinstance(self.system, str):
            return [Turn(role="system", content=self.system)]
        return [Turn(role="system", content=[*self.system])]

    @property
    def _effort(self) -> str | None:
        if isinstance(self.thinking, ThinkingDisabled):
            return "none"
        if self.output_config and self.output_config.effort:
            return self.output_config.effort
        return self.thinking.effort if isinstance(self.thinking, ThinkingEnabled) else None

    @property
    def _response_format(self) -> dict[str, Any] | None:
        form = self.output_config and self.output_config.format
        if not form:
            return None
        return {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": form.json_schema, "strict": True},
        }


class MessagesRequest(CountTokensRequest):
    """Body of ``POST /v1/messages``."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        **CountTokensRequest.refused,
        "container": Refusal("nothing here runs code"),
        "diagnostics": Refusal("messages are not kept here, so none can be compared"),
        "fallback_credit_token": Refusal("there are no such credits here"),
        "fallbacks": Refusal("only the model that is named answers", ([],)),
        "inference_geo": Refusal("inference happens where this server is"),
        "thread": Refusal("conversations are not kept here; send all of it"),
    }

    max_tokens: int = Field(ge=1, le=_MAX_INT32)
    stop_sequences: ListOf[Annotated[str, Field(min_length=1)]] | None = Field(
        None, max_length=MAX_STOP_STRINGS
    )
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_MAX_INT32)
    stream: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = Field(
        None, description="There is one tier, the standard one."
    )

    def _chat_fields(self) -> dict[str, Any]:
        return {
            **super()._chat_fields(),
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
            "user": self.metadata and self.metadata.user_id,
        }
