"""The items that a conversation consists of, and the chat messages they stand for."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from serving.protocol.errors import ApiError, conflict, unsupported
from serving.protocol.requests import (
    MAX_PARTS,
    OTHER_DETAIL,
    FunctionCall,
    ImagePart,
    ImageUrl,
    Message,
    Refusal,
    RefusedValues,
    RefusingBody,
    TextPart,
    ToolCall,
)
from serving.protocol.structured import ListOf

_Status = Literal["in_progress", "completed", "incomplete"]


def item_id(kind: Literal["resp", "msg", "rs", "fc", "fco"]) -> str:
    """A fresh identifier such as ``resp_…``."""
    return f"{kind}_{uuid.uuid4().hex}"


def by_type(value: Any) -> str:
    """The tag of a variant: its type, in brackets so that it is not taken for a field in errors."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


class _Part(RefusingBody):
    """Clients send back what they got, with the fields that are null."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: field for name, field in value.items() if field is not None}


class _InputPart(_Part):
    refused: ClassVar[Mapping[str, Refusal]] = {
        "file_id": Refusal("files cannot be shown to models here; send a data URL"),
        "prompt_cache_breakpoint": Refusal(
            "prefixes are found by their text, wherever they end; breakpoints cannot be set"
        ),
    }


class InputText(_InputPart):
    """Text for the model."""

    type: Literal["input_text"]
    text: str


class InputImage(_InputPart):
    """An image."""

    refused_values: ClassVar[Mapping[str, RefusedValues]] = {"detail": OTHER_DETAIL}

    type: Literal["input_image"]
    image_url: str = Field(description="A data URL.")
    detail: Literal["auto"] = "auto"

    @property
    def part(self) -> ImagePart:
        """The same in a chat."""
        return ImagePart(type="image_url", image_url=ImageUrl(url=self.image_url))


class OutputText(_Part):
    """Text of the model's. What else an answer's text has is taken back, and not read."""

    type: Literal["output_text"]
    text: str
    annotations: ListOf[Any] = Field(default=[], exclude=True)
    logprobs: Any = Field(None, exclude=True)
    parsed: Any = Field(None, exclude=True, description="SDKs' reading of the text.")


class OutputRefusal(_Part):
    """What the model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class SummaryText(_Part):
    """Reasoning in short."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(_Part):
    """Reasoning in full."""

    type: Literal["reasoning_text"]
    text: str


ContentPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[InputImage, Tag("<input_image>")]
    | Annotated[OutputText, Tag("<output_text>")]
    | Annotated[OutputRefusal, Tag("<refusal>")],
    Discriminator(
        by_type,
        custom_error_type="content_part",
        custom_error_message="a part's type must be 'input_text', 'input_image', 'output_text' or 'refusal': "
        "models here read no files and hear no audio",
    ),
]
_Content = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[ListOf[ContentPart], Field(min_length=1, max_length=MAX_PARTS), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<str>"),
]
_OutputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")] | Annotated[InputImage, Tag("<input_image>")],
    Discriminator(
        by_type,
        custom_error_type="output_part",
        custom_error_message="a part's type must be 'input_text' or 'input_image' here: models read no files",
    ),
]
_Output = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[ListOf[_OutputPart], Field(max_length=MAX_PARTS), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<str>"),
]


class MessageItem(_Part):
    """What somebody said."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "phase": Refusal("chat templates have no place for it")
    }

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content
    id: str | None = Field(None, max_length=256)
    status: _Status = "completed"

    @model_validator(mode="after")
    def _only_users_show_images(self) -> MessageItem:
        if self.role != "user" and any(isinstance(part, InputImage) for part in self._parts):
            raise conflict("content", "only messages of the user can hold images")
        return self

    @property
    def _parts(self) -> list[ContentPart]:
        return self.content if isinstance(self.content, list) else []

    @property
    def text(self) -> str:
        """The content's text as one string."""
        return (
            self.content if isinstance(self.content, str) else "".join(map(_text_of, self._parts))
        )

    @property
    def message(self) -> Message:
        """The same in a chat."""
        if not any(isinstance(part, InputImage) for part in self._parts):
            return Message(role=self.role, content=self.text)
        return Message(
            role=self.role,
            content=[
                part.part
                if isinstance(part, InputImage)
                else TextPart(type="text", text=_text_of(part))
                for part in self._parts
            ],
        )

    def to_json(self) -> dict[str, Any]:
        """The item as lists of items show it."""
        parts = self._parts or [InputText(type="input_text", text=self.text)]
        return {
            "id": self.id or item_id("msg"),
            "type": "message",
            "role": self.role,
            "status": self.status,
            "content": [
                _output_json(part) if self.role == "assistant" else part.model_dump()
                for part in parts
            ],
        }


def _text_of(part: ContentPart) -> str:
    if isinstance(part, InputImage):
        return ""
    return part.refusal if isinstance(part, OutputRefusal) else part.text


def _output_json(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, OutputRefusal):
        return part.model_dump()
    return {"type": "output_text", "text": _text_of(part), "annotations": []}


class ReasoningItem(_Part):
    """What the model thought before it spoke. A ``summary`` is read only where there is no more."""

    type: Literal["reasoning"]
    id: str | None = Field(None, max_length=256)
    summary: ListOf[SummaryText] = Field(default=[])
    content: ListOf[ReasoningText] = Field(default=[])
    encrypted_content: str | None = Field(
        None, exclude=True, description="As rigserve gave it; read where there is no 'content'."
    )
    status: _Status = "completed"

    @model_validator(mode="before")
    @classmethod
    def _unsealed(cls, value: Any) -> Any:
        sealed = value.get("encrypted_content") if isinstance(value, dict) else None
        if not isinstance(sealed, str) or value.get("content"):
            return value
        return {**value, "content": [{"type": "reasoning_text", "text": _unseal(sealed)}]}

    @property
    def text(self) -> str:
        """All of it as one string."""
        return "".join(part.text for part in self.content or self.summary)

    def to_json(self) -> dict[str, Any]:
        """The item as lists of items show it."""
        return {**self.model_dump(exclude_none=True), "id": self.id or item_id("rs")}


_SEAL = "rigserve:"


def seal(text: str) -> str:
    """Reasoning as ``encrypted_content``: opaque to clients, but no secret, as they get it in full, too."""
    return _SEAL + base64.urlsafe_b64encode(text.encode()).decode()


def _unseal(sealed: str) -> str:
    try:
        if sealed.startswith(_SEAL):
            return base64.b64decode(sealed.removeprefix(_SEAL), b"-_", validate=True).decode()
    except ValueError:
        pass
    raise unsupported(
        "encrypted_content",
        "what another server has encrypted cannot be read; send 'content', or leave the item out",
    )


_CALLER = Refusal("only the model calls functions here", ({"type": "direct"},))
_NAMESPACE = Refusal("functions have no namespaces here")


class FunctionCallItem(_Part):
    """A call the model made."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "async": Refusal("functions are called, not awaited, here", (False,)),
        "caller": _CALLER,
        "namespace": _NAMESPACE,
    }

    type: Literal["function_call"]
    id: str | None = Field(None, max_length=256)
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: str
    parsed_arguments: Any = Field(None, exclude=True, description="The arguments once more.")
    status: _Status = "completed"

    @property
    def call(self) -> ToolCall:
        """The same in a chat."""
        function = FunctionCall(name=self.name, arguments=self.arguments)
        return ToolCall(id=self.call_id, function=function)

    def to_json(self) -> dict[str, Any]:
        """The item as lists of items show it."""
        return {**self.model_dump(), "id": self.id or item_id("fc")}


class FunctionCallOutputItem(_Part):
    """What came of a call."""

    refused: ClassVar[Mapping[str, Refusal]] = {"caller": _CALLER, "namespace": _NAMESPACE}

    type: Literal["function_call_output"]
    id: str | None = Field(None, max_length=256)
    call_id: str = Field(min_length=1, max_length=256)
    name: str | None = Field(
        None, max_length=256, exclude=True, description="The function's, which the call has, too."
    )
    output: _Output
    status: _Status = "completed"

    @property
    def images(self) -> list[ImagePart]:
        """What it shows, as parts of a chat's message."""
        parts = self.output if isinstance(self.output, list) else ()
        return [part.part for part in parts if isinstance(part, InputImage)]

    @property
    def message(self) -> Message:
        """What it says, in a chat."""
        output = self.output
        text = output if isinstance(output, str) else "".join(map(_text_of, output))
        return Message(role="tool", tool_call_id=self.call_id, content=text)

    def to_json(self) -> dict[str, Any]:
        """The item as lists of items show it."""
        return {**self.model_dump(), "id": self.id or item_id("fco")}


def _kind_of_item(value: Any) -> str:
    kind = by_type(value)
    return "<message>" if kind == "<None>" and isinstance(value, dict) and "role" in value else kind


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item",
        custom_error_message="an item's type must be 'message', 'reasoning', 'function_call', "
        "'function_call_output' or 'item_reference'",
    ),
]


def reference_of(item: object) -> str | None:
    """The id of the item that an ``item_reference`` stands for; None if it is something else."""
    if not isinstance(item, dict) or item.get("type", "item_reference") != "item_reference":
        return None
    name = item.get("id")
    return name if isinstance(name, str) and item.keys() <= {"type", "id"} else None


def numbered(items: Iterable[Item], taken: set[str]) -> list[dict[str, Any]]:
    """The items as they are stored: each has an id that no other one, and none of the ``taken``, has."""
    taken = set(taken)
    stored = []
    for item in items:
        unique = item.model_copy(update={"id": None}) if item.id in taken else item
        stored.append(unique.to_json())
        taken.add(stored[-1]["id"])
    return stored


def conversation(items: Iterable[Item]) -> list[Message]:
    """The items as messages of a chat.

    Chat templates take images from users only: those in outputs of functions follow them, as the user's.
    Raises :class:`ApiError` (400) when a function's call and its output do not come in pairs.
    """
    messages: list[Message] = []
    images: list[ImagePart] = []
    turn = _AssistantTurn()
    unanswered: set[str] = set()
    for item in items:
        if images and not isinstance(item, FunctionCallOutputItem):
            messages.append(Message(role="user", content=[*images]))
            images = []
        spoken = isinstance(item, MessageItem) and item.role == "assistant"
        if spoken or isinstance(item, ReasoningItem | FunctionCallItem):
            if not turn.takes(item):
                messages.append(turn.message)
                turn = _AssistantTurn()
            turn.add(item)
            if isinstance(item, FunctionCallItem):
                if item.call_id in unanswered:
                    raise _mismatch(f"Two function calls have the call_id '{item.call_id}'.")
                unanswered.add(item.call_id)
            continue
        if not turn.is_empty:
            messages.append(turn.message)
            turn = _AssistantTurn()
        if isinstance(item, FunctionCallOutputItem):
            if item.call_id not in unanswered:
                raise _mismatch(
                    f"No function call found for the output with call_id '{item.call_id}'."
                )
            unanswered.remove(item.call_id)
            images += item.images
        assert isinstance(item, MessageItem | FunctionCallOutputItem)
        messages.append(item.message)
    if unanswered:
        raise _mismatch(f"No output found for the function call '{min(unanswered)}'.")
    if not turn.is_empty:
        messages.append(turn.message)
    if images:
        messages.append(Message(role="user", content=[*images]))
    return messages


def _mismatch(message: str) -> ApiError:
    return ApiError(400, message, param="input", code="invalid_value")


class _AssistantTurn:
    """What are several items here is one message in a chat: reasoning, then text, then calls."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: str | None = None
        self._calls: list[ToolCall] = []

    @property
    def is_empty(self) -> bool:
        return not self._reasoning and self._content is None and not self._calls

    def takes(self, item: Item) -> bool:
        """Whether the item can be part of this message."""
        if isinstance(item, FunctionCallItem):
            return True
        return self._content is None and not self._calls

    def add(self, item: Item) -> None:
        if isinstance(item, FunctionCallItem):
            self._calls.append(item.call)
        elif isinstance(item, ReasoningItem):
            self._reasoning.append(item.text)
        elif isinstance(item, MessageItem):
            self._content = item.text

    @property
    def message(self) -> Message:
        content = self._content
        if content is None and not self._calls and not any(self._reasoning):
            content = ""
        return Message(
            role="assistant",
            content=content,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=self._calls or None,
        )
