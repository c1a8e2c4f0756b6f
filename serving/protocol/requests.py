"""Request bodies. A field is honoured, or it is refused by name; nothing is silently ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError, from_json

from serving.protocol.errors import ApiError, from_validation

# OpenAI's own limits.
MAX_CHOICES = 128
MAX_STOP_STRINGS = 4
MAX_TOP_LOGPROBS = 20

_MAX_INT32 = 2**31 - 1
# What an answer's message holds beside its text: clients send it back as it came, mostly null.
_ANSWER_FIELDS = ("annotations", "audio", "function_call", "refusal", "tool_calls")

# Fields of OpenAI's API that no engine of ours implements yet, and the values that ask for nothing.
_CHAT_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_COMPLETION_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


def _conflict(param: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("conflict", "{message}", {"param": param, "message": message})


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StreamOptions(_Body):
    """``include_usage`` asks for one more chunk, before ``[DONE]``, with the request's usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(_Body):
    """What chat and text completions have in common."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT32, description="0 and -1: all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256)
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
    def choices(self) -> int:
        """How many completions of each prompt are asked for."""
        return self.n or 1

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether the client asked for usage in the stream."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _without_empty_answer_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: field
            for name, field in value.items()
            if name not in _ANSWER_FIELDS or field not in (None, [])
        }

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

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
    def token_limit(self) -> int | None:
        """Most tokens to generate; None means up to the end of the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprob_count(self) -> int | None:
        """Alternatives to report for each token; None means no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of ``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _some_prompt(cls, value: Any) -> Any:
        if value == [] or (isinstance(value, list) and [] in value):
            raise ValueError("the list must not be empty")
        for prompt in value if isinstance(value, list) else ():
            for token in prompt if isinstance(prompt, list) else (prompt,):
                if isinstance(token, int) and not 0 <= token <= _MAX_INT32:
                    raise ValueError("token ids are numbers from 0 to the size of the vocabulary")
        return value

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
        return self.max_tokens or 16

    @property
    def top_logprob_count(self) -> int | None:
        """Alternatives to report for each token; None means no log-probabilities at all."""
        return self.logprobs


_Request = TypeVar("_Request", bound=GenerationRequest)


def parse_chat(body: bytes) -> ChatCompletionRequest:
    """Parse a chat completion request; raises :class:`ApiError` (400) that names the field at fault."""
    return _parse(ChatCompletionRequest, body, _CHAT_REFUSED)


def parse_completion(body: bytes) -> CompletionRequest:
    """Parse a text completion request; raises :class:`ApiError` (400) that names the field at fault."""
    return _parse(CompletionRequest, body, _COMPLETION_REFUSED)


def _parse(kind: type[_Request], body: bytes, refused: Mapping[str, tuple[Any, ...]]) -> _Request:
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(
            400, f"The request body is not valid JSON: {error}.", code="invalid_json"
        ) from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The request body must be a JSON object.", code="invalid_json")
    for name, asks_for_nothing in refused.items():
        value = fields.pop(name, None)
        if value is not None and value not in asks_for_nothing:
            raise ApiError(
                400,
                f"'{name}' is not supported by this server; leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from error
