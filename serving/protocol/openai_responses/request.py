"""What the Responses API is asked for, and the chat completion that answers it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from serving.protocol.errors import ApiError, conflict
from serving.protocol.openai_responses.items import Item, MessageItem, by_type, conversation
from serving.protocol.openai_responses.names import renamed
from serving.protocol.requests import (
    MAX_MESSAGES,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
    OTHER_TIERS,
    ChatCompletionRequest,
    Function,
    ModelRequest,
    Refusal,
    RefusedValues,
    RefusingBody,
    only_functions,
    validated,
)
from serving.protocol.structured import Body, JsonSchema, ListOf

_MAX_INT32 = 2**31 - 1
# OpenAI's own limits.
_MAX_METADATA_KEYS = 16
_MAX_PAGE_ITEMS = 100

LOGPROBS = "message.output_text.logprobs"
_IMAGE_URLS = "message.input_image.image_url"  # they are always included
SEALED_REASONING = "reasoning.encrypted_content"
_INCLUDABLE = (LOGPROBS, SEALED_REASONING, _IMAGE_URLS)
_NO_SUMMARIES = "reasoning is given in full, as 'content'; nothing here sums it up"


def _includable(value: str) -> str:
    if value not in _INCLUDABLE:
        raise ValueError(f"only {', '.join(_INCLUDABLE)} can be included here")
    return value


Includable = Annotated[str, AfterValidator(_includable)]


class StreamOptions(RefusingBody):
    """Options of a stream: there are none."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "include_obfuscation": Refusal("events are not padded here", (False,))
    }


class FunctionTool(RefusingBody, Function):
    """A function the model may call."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "allowed_callers": Refusal("only the model calls functions here", (["direct"],)),
        "async": Refusal("functions are called, not awaited, here", (False,)),
        "defer_loading": Refusal("tools cannot be searched here", (False,)),
        "output_schema": Refusal("models here do not read it"),
    }

    type: Literal["function"]

    _only_functions = model_validator(mode="before")(only_functions)


class NamedFunction(Body):
    """One of the request's functions."""

    type: Literal["function"]
    name: str


class AllowedTools(Body):
    """The functions that may be called this time, and whether one must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: ListOf[NamedFunction] = Field(min_length=1)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(
        lambda value: "<word>" if isinstance(value, str) else by_type(value),
        custom_error_type="tool_choice",
        custom_error_message="must be 'none', 'auto', 'required', a function or allowed_tools: "
        "there are no other tools here",
    ),
]


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaFormat(JsonSchema):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


Format = Annotated[
    Annotated[PlainFormat, Tag("<text>")]
    | Annotated[PlainFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    Discriminator(
        by_type,
        custom_error_type="format",
        custom_error_message="the type must be 'text', 'json_object' or 'json_schema'",
    ),
]


class TextConfig(RefusingBody):
    """The answer's form."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "verbosity": Refusal(
            "models here have no such setting; ask for it in the instructions", ("medium",)
        )
    }

    format: Format | None = None


class Reasoning(RefusingBody):
    """How much to think first. A ``summary`` of ``auto`` leaves the choice to the server: the full text."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "context": Refusal("the chat template decides which reasoning a model sees", ("auto",)),
        "generate_summary": Refusal(_NO_SUMMARIES, ("auto",)),
        "mode": Refusal("models here have one mode", ("standard",)),
    }

    refused_values: ClassVar[Mapping[str, RefusedValues]] = {
        "summary": RefusedValues(_NO_SUMMARIES, ("concise", "detailed"))
    }

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None


_Input = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[ListOf[Item], Field(max_length=MAX_MESSAGES), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<str>"),
]
_Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=_MAX_METADATA_KEYS),
]


class ResponseRequest(ModelRequest):
    """Body of ``POST /v1/responses``."""

    path = "/v1/responses"
    refused: ClassVar[Mapping[str, Refusal]] = {
        "access_programs": Refusal("rigserve has no such programs"),
        "background_options": Refusal("work in the background begins at once", ({},)),
        "context_management": Refusal("conversations are not compacted here", ([],)),
        "conversation": Refusal("conversations are not kept here; use 'previous_response_id'"),
        "image": Refusal("images are not compressed here", ({},)),
        "max_tool_calls": Refusal("it limits built-in tools, and there are none here"),
        "moderation": Refusal("rigserve has no moderation models"),
        "prompt": Refusal("prompt templates are not kept here; send the prompt itself"),
        "prompt_cache_options": Refusal(
            "prefixes are cached by themselves, for as long as there is room; "
            "no lifetime can be promised",
            ({}, {"mode": "implicit"}),
        ),
        "prompt_cache_retention": Refusal(
            "prefixes are cached in memory only, for as long as there is room", ("in_memory",)
        ),
        "truncation": Refusal(
            "what does not fit into the model's context is refused, not shortened", ("disabled",)
        ),
    }
    refused_values: ClassVar[Mapping[str, RefusedValues]] = {"service_tier": OTHER_TIERS}

    input: _Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = Field(None, min_length=1, max_length=256)
    store: bool | None = Field(None, description="Keep the response for later. Unset: true.")
    background: bool | None = Field(None, description="Answer at once, and go on alone.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: ListOf[Includable] | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: ListOf[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        None, description="flex gives way to requests that are not."
    )
    metadata: _Metadata | None = None
    safety_identifier: str | None = Field(
        None,
        max_length=128,
        description="OpenAI's new name of 'user'; counts where that is not sent.",
    )
    prompt_cache_key: str | None = Field(
        None,
        max_length=256,
        description="Accepted; what it is for is done without: prefixes are found by their text, whoever sends them.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict(
                "stream_options", "'stream_options' is only allowed when 'stream' is true"
            )
        if self.background and self.stream:
            raise conflict("stream", "what is made in the background is not streamed; retrieve it")
        if self.background and self.store is False:
            raise conflict("store", "a response made in the background must be stored")
        if self.top_logprobs and not self.wants_logprobs:
            raise conflict(
                "top_logprobs", f"'top_logprobs' is only allowed when 'include' has '{LOGPROBS}'"
            )
        if not self.input and self.input != "" and self.previous_response_id is None:
            raise conflict("input", "'input' is required, unless 'previous_response_id' is given")
        return self

    @property
    def is_stored(self) -> bool:
        """Whether the response is kept."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return LOGPROBS in (self.include or ())

    @property
    def wants_sealed_reasoning(self) -> bool:
        """Whether reasoning is asked for in a form that clients keep without reading it."""
        return SEALED_REASONING in (self.include or ())

    @property
    def items(self) -> list[Item]:
        """The input as items."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input or []

    def chat(self, history: Iterable[Item]) -> ChatCompletionRequest:
        """The chat completion that continues ``history``; raises :class:`ApiError` (400)."""
        messages: list[Any] = conversation([*history, *self.items])
        if not messages:
            raise ApiError(400, "There is nothing to answer.", param="input", code="invalid_value")
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        fields = {
            "model": self.model,
            "user": self.user,
            "safety_identifier": self.safety_identifier,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": (self.top_logprobs or 0) if self.wants_logprobs else None,
            "response_format": self._response_format,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "tools": [
                {
                    "type": "function",
                    "function": tool.model_dump(
                        include=set(Function.model_fields), exclude_none=True
                    ),
                }
                for tool in self.tools or ()
            ]
            or None,
            "tool_choice": _chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "service_tier": self.service_tier,
            "stream": self.stream,
        }
        try:
            return validated(ChatCompletionRequest, fields)
        except ApiError as error:
            told = renamed(error.body["error"])
            raise ApiError(400, told["message"], code=error.code, param=told["param"]) from error

    @property
    def _response_format(self) -> dict[str, Any] | None:
        form = self.text and self.text.format
        if form is None:
            return None
        if isinstance(form, PlainFormat):
            return {"type": form.type}
        schema = form.model_dump(by_alias=True, exclude={"type"})
        return {"type": "json_schema", "json_schema": schema}


def _chat_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    if isinstance(choice, NamedFunction):
        return _chat_function(choice)
    if isinstance(choice, AllowedTools):
        allowed = {"mode": choice.mode, "tools": list(map(_chat_function, choice.tools))}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _chat_function(function: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}


class _Query(Body):
    """A query string: its values are text that stands for others."""

    model_config = ConfigDict(strict=False)

    include: ListOf[Includable] | None = None


class RetrieveQuery(_Query):
    """Query of ``GET /v1/responses/{id}``. A response is retrieved whole."""

    stream: bool = False
    include_obfuscation: bool = False
    starting_after: int | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name in ("stream", "include_obfuscation", "starting_after"):
            value = getattr(self, name)
            if value is not None and value is not False:
                raise conflict(
                    name, f"'{name}' is not supported: stored responses are not streamed"
                )
        return self


class InputItemsQuery(_Query):
    """Query of ``GET /v1/responses/{id}/input_items``: a page of items."""

    after: str | None = Field(None, max_length=256)
    limit: int = Field(20, ge=1, le=_MAX_PAGE_ITEMS)
    order: Literal["asc", "desc"] = "desc"

    def page(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The page of ``items``, which come oldest first. Raises :class:`ApiError` (400)."""
        items = items if self.order == "asc" else items[::-1]
        start = 0
        if self.after is not None:
            ids = [item["id"] for item in items]
            if self.after not in ids:
                raise ApiError(
                    400,
                    f"'after': no item of this response has the id '{self.after}'.",
                    param="after",
                    code="invalid_value",
                )
            start = ids.index(self.after) + 1
        shown = items[start : start + self.limit]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": start + self.limit < len(items),
        }
