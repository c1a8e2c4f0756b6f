"""A chat completion's answer, whole or streamed, as a response and its events."""

from __future__ import annotations

from typing import Any

import orjson

from serving.protocol.openai_responses.answer import (
    ItemStatus,
    call_item,
    failed,
    finished,
    message_item,
    output_of,
    reasoning_item,
    reasoning_part,
    text_part,
)
from serving.protocol.openai_responses.items import item_id, seal
from serving.protocol.openai_responses.names import renamed


class ResponseTranslation:
    """One request's way back. ``response`` is what there is of the response so far.

    Of a stream, the event that ends it is not among those that :meth:`end` and :meth:`failure` give: it
    tells that the response is there to be retrieved, so :meth:`terminal` gives it once that is true.
    """

    def __init__(self, begun: dict[str, Any], *, seal_reasoning: bool = False) -> None:
        self.response = begun
        self._seal_reasoning = seal_reasoning
        self._events = _Events()
        self._output: list[dict[str, Any]] = []
        self._open: _OpenItem | None = None
        self._finish_reason: str | None = None
        self._last: dict[str, Any] = {}
        self._announced = False

    def answer(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The body of a whole answer, from a chat completion's."""
        choice = completion["choices"][0]
        output = list(map(self._sealed, output_of(choice)))
        self.response = finished(self.response, output, choice["finish_reason"], completion)
        return self.response

    def _sealed(self, item: dict[str, Any]) -> dict[str, Any]:
        """A finished item; of reasoning, with its text once more if that is asked for."""
        if item["type"] != "reasoning" or not self._seal_reasoning:
            return item
        text = "".join(part["text"] for part in item["content"])
        return {**item, "encrypted_content": seal(text)}

    def refusal(self, status: int, error: dict[str, Any]) -> dict[str, Any]:
        """The body of an error response: OpenAI's, in the words of this API."""
        del status
        return {"error": renamed(error["error"])}

    def fail(self, error: dict[str, Any]) -> None:
        """The response has failed; ``error`` is the body of the error response."""
        self.response = failed(self.response, self._output, renamed(error["error"]))

    def chunk(self, chunk: dict[str, Any]) -> bytes:
        """The events that a stream's chunk brings."""
        told = self._announcement()
        if not chunk["choices"]:
            self._last = chunk
            return told
        choice = chunk["choices"][0]
        delta = choice["delta"]
        if delta.get("reasoning_content"):
            told += self._into(_OpenReasoning) + self._add(delta["reasoning_content"], [])
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        if delta.get("content"):
            told += self._into(_OpenMessage) + self._add(delta["content"], logprobs)
        for call in delta.get("tool_calls") or ():
            if call.get("id"):
                told += self._closed("completed")
                told += self._opened(_OpenCall(call["id"], call["function"]["name"]))
            if call["function"].get("arguments"):
                told += self._add(call["function"]["arguments"], [])
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        return told

    def failure(self, error: dict[str, Any]) -> bytes:
        """The events that tell that something went wrong, but for the last."""
        told = self._announcement() + self._closed("incomplete")
        self.fail(error)
        told_error = renamed(error["error"])
        return told + self._events.write(
            "error",
            code=told_error.get("code"),
            message=told_error.get("message") or "",
            param=told_error.get("param"),
        )

    def end(self) -> bytes:
        """The events that end the last item."""
        told = self._announcement()
        if self._open is None and not self._output:
            told += self._into(_OpenMessage)
        cut_short = self._finish_reason in ("length", "content_filter")
        told += self._closed("incomplete" if cut_short else "completed")
        self.response = finished(self.response, self._output, self._finish_reason, self._last)
        return told

    def terminal(self) -> bytes:
        """The event that ends the stream: how the response has ended."""
        return self._events.write(f"response.{self.response['status']}", response=self.response)

    def _announcement(self) -> bytes:
        """The events that every stream begins with, once."""
        if self._announced:
            return b""
        self._announced = True
        return b"".join(
            self._events.write(f"response.{kind}", response=self.response)
            for kind in ("created", "in_progress")
        )

    def _into(self, kind: type[_OpenReasoning] | type[_OpenMessage]) -> bytes:
        if isinstance(self._open, kind):
            return b""
        return self._closed("completed") + self._opened(kind())

    def _opened(self, item: _OpenItem) -> bytes:
        self._open = item
        return self._events.write_all(item.opening(), output_index=len(self._output))

    def _add(self, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        if self._open is None:
            raise ValueError("a call's arguments came before the call")
        delta = self._open.add(text, logprobs)
        return self._events.write_all([delta], output_index=len(self._output))

    def _closed(self, status: ItemStatus) -> bytes:
        if self._open is None:
            return b""
        closing = self._open.closing(status)
        closing[-1]["item"] = self._sealed(closing[-1]["item"])
        told = self._events.write_all(closing, output_index=len(self._output))
        self._output.append(closing[-1]["item"])
        self._open = None
        return told


class _Events:
    """Writes events and numbers them."""

    def __init__(self) -> None:
        self._sequence_number = 0

    def write(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data))

    def write_all(self, events: list[dict[str, Any]], *, output_index: int) -> bytes:
        return b"".join(
            self.write(event["type"], output_index=output_index, **_without_type(event))
            for event in events
        )


def _without_type(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "type"}


class _OpenItem:
    """An output item that is being written. The last of its events holds it as it became."""

    def __init__(self, identifier: str) -> None:
        self.id = identifier
        self._texts: list[str] = []

    def opening(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """Take in a piece of text; gives the event that tells it."""
        raise NotImplementedError

    def closing(self, status: ItemStatus) -> list[dict[str, Any]]:
        raise NotImplementedError

    @property
    def text(self) -> str:
        return "".join(self._texts)


class _OpenMessage(_OpenItem):
    def __init__(self) -> None:
        super().__init__(item_id("msg"))
        self._logprobs: list[dict[str, Any]] = []
        self._place = {"item_id": self.id, "content_index": 0}

    def opening(self) -> list[dict[str, Any]]:
        return [
            _added(message_item(self.id, [], "in_progress")),
            {"type": "response.content_part.added", **self._place, "part": text_part("", [])},
        ]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        self._texts.append(text)
        self._logprobs += logprobs
        told = {"delta": text, "logprobs": logprobs}
        return {"type": "response.output_text.delta", **self._place, **told}

    def closing(self, status: ItemStatus) -> list[dict[str, Any]]:
        part = text_part(self.text, self._logprobs)
        told = {"text": self.text, "logprobs": self._logprobs}
        return [
            {"type": "response.output_text.done", **self._place, **told},
            {"type": "response.content_part.done", **self._place, "part": part},
            _done(message_item(self.id, [part], status)),
        ]


class _OpenReasoning(_OpenItem):
    def __init__(self) -> None:
        super().__init__(item_id("rs"))
        self._place = {"item_id": self.id, "content_index": 0}

    def opening(self) -> list[dict[str, Any]]:
        return [
            _added(reasoning_item(self.id, [], "in_progress")),
            {"type": "response.content_part.added", **self._place, "part": reasoning_part("")},
        ]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        self._texts.append(text)
        return {"type": "response.reasoning_text.delta", **self._place, "delta": text}

    def closing(self, status: ItemStatus) -> list[dict[str, Any]]:
        part = reasoning_part(self.text)
        return [
            {"type": "response.reasoning_text.done", **self._place, "text": self.text},
            {"type": "response.content_part.done", **self._place, "part": part},
            _done(reasoning_item(self.id, [part], status)),
        ]


class _OpenCall(_OpenItem):
    def __init__(self, call_id: str, name: str) -> None:
        super().__init__(item_id("fc"))
        self._call_id = call_id
        self._name = name

    def opening(self) -> list[dict[str, Any]]:
        return [_added(call_item(self.id, self._call_id, self._name, "", "in_progress"))]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        self._texts.append(text)
        kind = "response.function_call_arguments.delta"
        return {"type": kind, "item_id": self.id, "delta": text}

    def closing(self, status: ItemStatus) -> list[dict[str, Any]]:
        told = {"item_id": self.id, "name": self._name, "arguments": self.text}
        return [
            {"type": "response.function_call_arguments.done", **told},
            _done(call_item(self.id, self._call_id, self._name, self.text, status)),
        ]


def _added(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.output_item.added", "item": item}


def _done(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "response.output_item.done", "item": item}
