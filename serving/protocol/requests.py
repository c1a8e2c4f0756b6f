"""Request bodies. A field is honoured, or it is refused by name; nothing is silently ignored."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from serving.protocol.errors import ApiError, from_validation, unsupported
from serving.protocol.errors import conflict as _conflict
from serving.protocol.structured import Body as _Body
from serving.protocol.structured import ConstraintSpec, ListOf, ResponseFormat, StructuredRequest
from serving.protocol.tenancy import Priority

# OpenAI's own limits.
MAX_CHOICES = 128
MAX_STOP_STRINGS = 4
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
# Ours: what is checked in Python takes the gateway's time, of which everybody has a share.
MAX_MESSAGES = 8192
MAX_PARTS = 8192
MAX_LOGIT_BIASES = 1024
MAX_OBJECTS = 65_536
MAX_FIELDS = 8192

_MAX_INT32 = 2**31 - 1
_MAX_IDENTIFIER = 128


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a field of OpenAI's API is refused. ``nothing``: values, beside null, that ask for nothing."""

    reason: str
    nothing: tuple[Any, ...] = ()

    def accepts(self, value: object) -> bool:
        """Whether a value asks for nothing."""
        return value is None or any(
            type(value) is type(each) and value == each for each in self.nothing
        )


@dataclass(frozen=True, slots=True)
class RefusedValues:
    """Values that OpenAI has for a field that is honoured, and why they are refused."""

    reason: str
    values: tuple[str, ...]


class RefusingBody(_Body):
    """A body that knows more of OpenAI's than it honours.

    ``refused``: fields that no engine of ours implements. Values that ask for nothing are dropped.
    ``refused_values``: of the other fields.
    """

    refused: ClassVar[Mapping[str, Refusal]] = {}
    refused_values: ClassVar[Mapping[str, RefusedValues]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, other in cls.refused_values.items():
            if fields.get(name) in other.values:
                raise unsupported(name, other.reason, value=fields[name])
        if cls.refused.keys().isdisjoint(fields):
            return fields
        for name, refusal in cls.refused.items():
            if not refusal.accepts(fields.get(name)):
                raise unsupported(name, refusal.reason)
        return {name: value for name, value in fields.items() if name not in cls.refused}


class StreamOptions(RefusingBody):
    """``include_usage`` asks for one more chunk, before ``[DONE]``, with the request's usage."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "include_obfuscation": Refusal("chunks are not padded here", (False,))
    }

    include_usage: bool = False


class ModelRequest(RefusingBody):
    """What every request to a model has. ``path``: where an engine takes it."""

    path: ClassVar[str]

    model: str = Field(min_length=1, max_length=256)
    user: str | None = Field(
        None,
        max_length=256,
        description="Requests of one user wait in one line, and are that user's in the ledger.",
    )

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Parse a request's body; raises :class:`ApiError` (400) that names the field at fault."""
        return cls.of(read_object(body))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """The request with these fields; raises :class:`ApiError` (400) that names the one at fault."""
        return validated(cls, fields)


class GenerationRequest(StructuredRequest, ModelRequest):
    """What chat and text completions have in common."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT32, description="0 and -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | ListOf[str] | None = Field(
        None, description=f"At most {MAX_STOP_STRINGS} texts; none may be empty."
    )
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(
        None,
        description=f"At most {MAX_LOGIT_BIASES} tokens, each with a bias between -100 and 100.",
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="Generate up to the limit; for load tests.")

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
        if any(not text for text in strings):
            raise ValueError("stop strings must not be empty")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_tokens(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_LOGIT_BIASES:
            raise ValueError(f"at most {MAX_LOGIT_BIASES} tokens are allowed, got {len(value)}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token, bias in (value or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > 10:
                raise ValueError(f"keys are token ids, such as '1234'; got {token[:20]!r}")
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token} must lie between -100 and 100")
        return value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _conflict(
                "stream_options", "'stream_options' is only allowed when 'stream' is true"
            )
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def priority(self) -> Priority:
        """How urgent the client says it is."""
        return "interactive"

    @property
    def choices(self) -> int:
        """How many completions of each prompt are asked for."""
        return self.n or 1

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether the client asked for usage in the stream."""
        return self.stream_options is not None and self.stream_options.include_usage


class _Part(RefusingBody):
    """A piece of a message's content."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "prompt_cache_breakpoint": Refusal(
            "prefixes are found by their text, wherever they end; breakpoints cannot be set"
        )
    }


class TextPart(_Part):
    """Text in a message's content."""

    type: Literal["text"]
    text: str


# Of chat completions and of responses.
OTHER_DETAIL = RefusedValues(
    "how closely a model looks is its projector's matter", ("low", "high", "original")
)
OTHER_TIERS = RefusedValues(
    "no request here goes before the others; 'flex' goes after them",
    ("fast", "priority", "scale"),
)


class ImageUrl(RefusingBody):
    """An image."""

    refused_values: ClassVar[Mapping[str, RefusedValues]] = {"detail": OTHER_DETAIL}

    url: str = Field(description="A data URL.")
    detail: Literal["auto"] | None = None


class ImagePart(_Part):
    """An image in a message's content."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Function(_Body):
    """A function the model may call. ``strict``: its arguments must follow ``parameters`` exactly."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError("the schema's type must be 'object': arguments have names")
        return value


def only_functions(tool: Any) -> Any:
    """Before a tool is read: refuses all of it by its ``type``, unless it is a function."""
    if isinstance(tool, dict) and tool.get("type") not in (None, "function"):
        raise unsupported("type", "only tools of type 'function' can be used here", tells_kind=True)
    return tool


class Tool(_Body):
    """A tool of the only kind there is: a function."""

    type: Literal["function"]
    function: Function

    _only_functions = model_validator(mode="before")(only_functions)


class FunctionName(_Body):
    """Names one of the request's functions."""

    name: str


class NamedTool(_Body):
    """One of the request's tools."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(_Body):
    """The tools that may be called this time, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: ListOf[NamedTool] = Field(min_length=1)


class AllowedToolChoice(_Body):
    """A choice among some of the request's tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str:
    if isinstance(value, str):
        return "<word>"
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


# Tags in angle brackets are not taken for fields when an error is located.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<function>")]
    | Annotated[AllowedToolChoice, Tag("<allowed_tools>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="tool_choice",
        custom_error_message="must be 'none', 'auto', 'required', a function or allowed_tools: "
        "there are no other tools here",
    ),
]

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _kind_of_choice,
        custom_error_type="content_part",
        custom_error_message="a part's type must be 'text' or 'image_url': models here read no files and hear no "
        "audio, and a refusal goes back as text",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[ListOf[ContentPart], Field(min_length=1, max_length=MAX_PARTS), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<str>"),
]


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request's answer may or must call."""

    functions: tuple[Function, ...]
    required: bool
    parallel: bool


class FunctionCall(_Body):
    """A function's name and its arguments as JSON text, as the model wrote them."""

    name: str
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True, description="The arguments once more.")


class ToolCall(_Body):
    """A call the assistant has made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(None, description="Streams number calls; the order says the same.")


class Message(RefusingBody):
    """One turn of a conversation."""

    # What an answer's message holds beside its text comes back from clients, mostly null.
    refused: ClassVar[Mapping[str, Refusal]] = {
        "annotations": Refusal("answers here cite nothing", ([],)),
        "audio": Refusal("models here neither hear nor speak"),
        "function_call": Refusal("OpenAI has replaced it by 'tool_calls'; send that"),
        "refusal": Refusal("chat templates have no place for it; send it as 'content'"),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(None, max_length=64)
    tool_calls: ListOf[ToolCall] | None = Field(None, max_length=MAX_TOOL_CALLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    parsed: Any = Field(None, exclude=True, description="SDKs' reading of the content; not used.")

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _no_calls(cls, value: Any) -> Any:
        # Clients send an answer back as it came; some list the calls that it does not have.
        return None if value == [] else value

    @model_validator(mode="after")
    def _fields_suit_the_role(self) -> Self:
        if self.role != "assistant":
            for name in ("tool_calls", "reasoning_content"):
                if getattr(self, name) is not None:
                    raise _conflict(name, "only messages of the assistant have this")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise _conflict("tool_call_id", "messages of role 'tool', and only they, need this")
        if self.content is None and not (self.tool_calls or self.reasoning_content):
            raise _conflict("content", "a message needs content, unless it calls tools")
        if self.role != "user" and self.has_images:
            raise _conflict("content", "only messages of the user can hold images")
        return self

    @property
    def text(self) -> str:
        """The content's text as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or () if isinstance(part, TextPart))

    @property
    def has_images(self) -> bool:
        """Whether there is more than text."""
        return not isinstance(self.content, str) and any(
            isinstance(part, ImagePart) for part in self.content or ()
        )


Messages = Annotated[ListOf[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    path = "/v1/chat/completions"
    refused: ClassVar[Mapping[str, Refusal]] = {
        "audio": Refusal("models here do not speak"),
        "function_call": Refusal("OpenAI has replaced it by 'tool_choice'; send that", ("none",)),
        "functions": Refusal("OpenAI has replaced it by 'tools'; send that", ([],)),
        "metadata": Refusal(
            "chat completions are never stored here, so there is nothing to attach it to", ({},)
        ),
        "modalities": Refusal("models here answer with text only", (["text"],)),
        "moderation": Refusal("rigserve has no moderation models"),
        "prediction": Refusal(
            "engines take no predictions; with the config's speculation: prompt_lookup they guess "
            "from the prompt"
        ),
        "prompt_cache_options": Refusal(
            "prefixes are cached by themselves, for as long as there is room; "
            "no lifetime can be promised",
            ({}, {"mode": "implicit"}),
        ),
        "prompt_cache_retention": Refusal(
            "prefixes are cached in memory only, for as long as there is room", ("in_memory",)
        ),
        "store": Refusal("chat completions are never stored here", (False,)),
        "verbosity": Refusal(
            "models here have no such setting; ask for it in the system message", ("medium",)
        ),
        "web_search_options": Refusal("models here cannot search the web"),
    }
    refused_values: ClassVar[Mapping[str, RefusedValues]] = {"service_tier": OTHER_TIERS}

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        None, description="flex gives way to requests that are not."
    )
    tools: ListOf[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )
    safety_identifier: str | None = Field(
        None,
        max_length=_MAX_IDENTIFIER,
        exclude=True,
        description="OpenAI's new name of 'user'; counts where that is not sent.",
    )
    prompt_cache_key: str | None = Field(
        None,
        max_length=256,
        exclude=True,
        description="Accepted; what it is for is done without: prefixes are found by their text, whoever sends them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _user_has_a_new_name(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("user") is not None:
            return fields
        identifier = fields.get("safety_identifier")
        # One that is no good is left for its own check to name.
        if not isinstance(identifier, str) or len(identifier) > _MAX_IDENTIFIER:
            return fields
        return {**fields, "user": identifier}

    @model_validator(mode="after")
    def _results_answer_calls(self) -> Self:
        called: set[str] = set()
        for index, message in enumerate(self.messages):
            called.update(call.id for call in message.tool_calls or ())
            if message.tool_call_id is not None and message.tool_call_id not in called:
                raise _conflict(
                    f"messages[{index}].tool_call_id",
                    f"'messages[{index}].tool_call_id' is that of no call in an earlier message",
                )
        return self

    @model_validator(mode="after")
    def _tools_are_known(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise _conflict("tools", "two functions in 'tools' have the same name")
        # Not as strict as OpenAI, where 'auto' and 'parallel_tool_calls' need tools: agent frameworks
        # send them along without, and they then ask for nothing.
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise _conflict("tool_choice", "'tool_choice' asks for a call, but 'tools' has none")
        for name in self._chosen or ():
            if name not in names:
                raise _conflict(
                    "tool_choice", f"'tool_choice' names {name!r}, which is not in 'tools'"
                )
        return self

    @property
    def _chosen(self) -> list[str] | None:
        """Names of the functions that ``tool_choice`` narrows the tools to; None: it does not."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedToolChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def has_images(self) -> bool:
        """Whether there is an image in the conversation."""
        return any(message.has_images for message in self.messages)

    @property
    def tool_use(self) -> ToolUse | None:
        """What may be called; None if nothing may. A function that is named is called once."""
        choice, chosen = self.tool_choice, self._chosen
        if not self.tools or choice == "none":
            return None
        named = isinstance(choice, NamedTool)
        if isinstance(choice, AllowedToolChoice):
            choice = choice.allowed_tools.mode
        return ToolUse(
            functions=tuple(
                tool.function
                for tool in self.tools
                if chosen is None or tool.function.name in chosen
            ),
            required=named or choice == "required",
            parallel=self.parallel_tool_calls is not False and not named,
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _conflict(
                "top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true"
            )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise _conflict(
                "max_tokens",
                "'max_tokens' and 'max_completion_tokens' differ; send only one of them",
            )
        return self

    @property
    def priority(self) -> Priority:
        """``flex`` is for work that nobody waits for."""
        return "batch" if self.service_tier == "flex" else "interactive"

    def _constraints(self) -> list[ConstraintSpec]:
        asked = self.response_format and self.response_format.constraint
        return [*([asked] if asked else []), *super()._constraints()]

    @property
    def token_limit(self) -> int | None:
        """Most tokens to generate; None means up to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprob_count(self) -> int | None:
        """Alternatives to report for each token; None means no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    path = "/v1/completions"
    refused: ClassVar[Mapping[str, Refusal]] = {
        "best_of": Refusal("completions are not ranked here; ask for several with 'n'", (1,))
    }

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    max_tokens: int | None = Field(None, ge=0, le=_MAX_INT32)
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: Any) -> Any:
        if value == [] or (isinstance(value, list) and [] in value):
            raise ValueError("the list must not be empty")
        return value

    @model_validator(mode="after")
    def _generates_or_echoes(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise _conflict("max_tokens", "'max_tokens' 0 is only allowed when 'echo' is true")
        if self.echo and self.suffix:
            raise _conflict("suffix", "'suffix' and 'echo' exclude each other; send one of them")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def token_limit(self) -> int:
        """Most tokens to generate; 16 is OpenAI's default for this endpoint."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top_logprob_count(self) -> int | None:
        """Alternatives to report for each token; None means no log-probabilities at all."""
        return self.logprobs


class LoadAdapterRequest(_Body):
    """Body of ``POST /v1/load_lora_adapter``, as vLLM names it; ``scale`` multiplies what it changes.

    With ``load_inplace`` it may take the place of another of its name.
    """

    lora_name: str = Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    scale: float = 1.0


class UnloadAdapterRequest(_Body):
    """Body of ``POST /v1/unload_lora_adapter``, as vLLM names it."""

    lora_name: str


_Request = TypeVar("_Request", bound=_Body)


def read_object(body: bytes) -> dict[str, Any]:
    """A request's body, a JSON object; raises :class:`ApiError` (400)."""
    # Lists are the most memory for the fewest bytes: they are counted before they are made.
    if body.count(b"[") > MAX_OBJECTS and _STRING.sub(b"", body).count(b"[") > MAX_OBJECTS:
        raise _too_complex()
    try:
        json.loads(body, object_pairs_hook=_Objects().check, parse_float=_finite)
        # The stricter parser: no NaN, no halves of surrogate pairs, no encoding but UTF-8.
        fields = from_json(body, allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"The request body is not valid JSON: {error}.", code="invalid_json"
        ) from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    return fields


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def _too_complex() -> ApiError:
    return ApiError(
        400,
        f"The request body has too many parts: at most {MAX_OBJECTS} lists and as many objects, "
        f"each of {MAX_FIELDS} fields, are allowed.",
        code="request_too_complex",
    )


class _Objects:
    """Checks the objects of a body while it is parsed.

    Parsers differ in which of several fields of one name counts: nobody should rely on theirs.
    """

    def __init__(self) -> None:
        self._count = 0

    def check(self, pairs: list[tuple[str, Any]]) -> None:
        """Raise :class:`ApiError` or :class:`ValueError` for an object that should not be there."""
        self._count += 1
        if self._count > MAX_OBJECTS or len(pairs) > MAX_FIELDS:
            raise _too_complex()
        names = set()
        for name, _ in pairs:
            if name in names:
                raise ValueError(f"an object has two fields named {name[:64]!r}")
            names.add(name)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:32]} is out of range")
    return number


def validated(kind: type[_Request], fields: dict[str, Any]) -> _Request:
    """A body with these fields; raises :class:`ApiError` (400) that names the one at fault."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from error
