"""The turns and content blocks of Anthropic's Messages API, and the chat messages they stand for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from serving.protocol.errors import conflict
from serving.protocol.requests import MAX_PARTS, Refusal, RefusingBody
from serving.protocol.structured import Body, ListOf

Role = Literal["user", "assistant", "system"]

_MAX_IDENTIFIER = 256


def by_type(value: Any) -> str:
    """The tag of a variant: its type, in brackets so that it is not taken for a field in errors."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>"


def _by_form(value: Any) -> str:
    """The tag of content: text, or a list of blocks."""
    return "<list>" if isinstance(value, list) else "<str>"


class CacheControl(Body):
    """Where a prefix to keep ends. Not needed: prefixes are found by their text, wherever they end."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class _Block(RefusingBody):
    """A piece of a message's content."""

    cache_control: CacheControl | None = None


class TextBlock(_Block):
    """Text."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "citations": Refusal("models here cite nothing", ([],))
    }

    type: Literal["text"]
    text: str


class Base64Source(Body):
    """An image itself."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str

    @model_validator(mode="before")
    @classmethod
    def _is_here(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") in ("url", "file"):
            raise conflict(
                "type", "images are not fetched from elsewhere; send the image itself, as 'base64'"
            )
        return value


class ImageBlock(_Block):
    """An image."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "transformations": Refusal("how an image is scaled is its model's own matter", ({},))
    }

    type: Literal["image"]
    source: Base64Source

    @property
    def part(self) -> dict[str, Any]:
        """The same in a chat."""
        url = f"data:{self.source.media_type};base64,{self.source.data}"
        return {"type": "image_url", "image_url": {"url": url}}


class ThinkingBlock(Body):
    """What the model thought. Answers here have an empty ``signature``, and nobody's is verified."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(_Block):
    """A call the model made."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "caller": Refusal("only the model itself calls tools here", ({"type": "direct"},)),
        "toolset_name": Refusal("there are no toolsets here"),
    }

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=_MAX_IDENTIFIER)
    name: str = Field(min_length=1, max_length=_MAX_IDENTIFIER)
    input: dict[str, Any]

    @property
    def call(self) -> dict[str, Any]:
        """The same in a chat."""
        arguments = json.dumps(self.input, ensure_ascii=False)
        function = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


Text = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[ListOf[TextBlock], Field(max_length=MAX_PARTS), Tag("<list>")],
    Discriminator(_by_form),
]
_Shown = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ImageBlock, Tag("<image>")],
    Discriminator(
        by_type,
        custom_error_type="block",
        custom_error_message="a block's type must be 'text' or 'image' here: models read no documents and "
        "no search results",
    ),
]


class ToolResultBlock(_Block):
    """What came of a call."""

    refused: ClassVar[Mapping[str, Refusal]] = {
        "toolset_name": Refusal("there are no toolsets here")
    }

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=_MAX_IDENTIFIER)
    content: (
        Annotated[
            Annotated[str, Tag("<str>")]
            | Annotated[ListOf[_Shown], Field(max_length=MAX_PARTS), Tag("<list>")],
            Discriminator(_by_form),
        ]
        | None
    ) = None
    is_error: bool | None = Field(
        None, description="Chat templates know no errors: the text then begins with 'Error: '."
    )

    @property
    def images(self) -> list[ImageBlock]:
        """What the result shows."""
        shown = self.content if isinstance(self.content, list) else ()
        return [block for block in shown if isinstance(block, ImageBlock)]

    @property
    def text(self) -> str:
        """What the result says, as one string."""
        if isinstance(self.content, str):
            text = self.content
        else:
            text = "\n".join(
                block.text for block in self.content or () if isinstance(block, TextBlock)
            )
        return f"Error: {text}" if self.is_error else text


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ImageBlock, Tag("<image>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(
        by_type,
        custom_error_type="block",
        custom_error_message="a block's type must be 'text', 'image', 'thinking', 'tool_use' or "
        "'tool_result': models here read no documents, no search results, and nothing that another "
        "server has encrypted or run",
    ),
]

_BLOCKS_OF: Mapping[Role, tuple[type[Body], ...]] = {
    "user": (TextBlock, ImageBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}


class Turn(Body):
    """What somebody said, showed, did or thought."""

    role: Role
    content: Annotated[
        Annotated[str, Tag("<str>")]
        | Annotated[ListOf[Block], Field(max_length=MAX_PARTS), Tag("<list>")],
        Discriminator(_by_form),
    ]

    @model_validator(mode="after")
    def _blocks_suit_the_role(self) -> Self:
        # The model may have had nothing to say: its answer comes back as it was.
        if self.role != "assistant" and not self.content:
            raise conflict("content", f"a message of role '{self.role}' needs content")
        for index, block in enumerate(self.blocks):
            if not isinstance(block, _BLOCKS_OF[self.role]):
                raise conflict(
                    f"content[{index}].type",
                    f"a message of role '{self.role}' cannot hold a block of type '{block.type}'",
                )
        return self

    @property
    def blocks(self) -> list[Block]:
        """The content as blocks; there is one at least."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content or [TextBlock(type="text", text="")]


@dataclass(slots=True)
class _ChatTurn:
    """A message of a chat in the making. ``answers``: the call whose result it is."""

    role: Literal["user", "assistant", "system", "tool"]
    answers: str | None = None
    shown: list[TextBlock | ImageBlock] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """Take in a block that is no result of a call."""
        if isinstance(block, ThinkingBlock):
            self.thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            self.calls.append(block.call)
        elif not isinstance(block, ToolResultBlock):
            self.shown.append(block)

    @property
    def message(self) -> dict[str, Any]:
        """As a chat completion's request has it; adjacent texts are lines of one."""
        parts: list[dict[str, Any]] = []
        for kind, blocks in itertools.groupby(self.shown, type):
            if kind is TextBlock:
                text = "\n".join(block.text for block in blocks if isinstance(block, TextBlock))
                parts.append({"type": "text", "text": text})
            else:
                parts += [block.part for block in blocks if isinstance(block, ImageBlock)]
        message: dict[str, Any] = {"role": self.role, "content": parts}
        if not any(part["type"] == "image_url" for part in parts):
            message["content"] = parts[0]["text"] if parts else ""
        if self.answers is not None:
            message["tool_call_id"] = self.answers
        if self.thoughts:
            message["reasoning_content"] = "\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def conversation(turns: Iterable[Turn]) -> list[dict[str, Any]]:
    """The turns as a chat's messages: what one speaker says in a row is one message, each result its own.

    Chat templates take images from users only: those in results follow them, as the user's.
    """
    chat: list[_ChatTurn] = []
    for turn in turns:
        images: list[TextBlock | ImageBlock] = []
        for block in turn.blocks:
            if isinstance(block, ToolResultBlock):
                result = TextBlock(type="text", text=block.text)
                chat.append(_ChatTurn("tool", answers=block.tool_use_id, shown=[result]))
                images += block.images
                continue
            if not chat or chat[-1].role != turn.role:
                chat.append(_ChatTurn(turn.role, shown=images))
                images = []
            chat[-1].add(block)
        if images:
            chat.append(_ChatTurn("user", shown=images))
    return [each.message for each in chat]
