"""From a scenario to requests: conversations, their prompts, and what follows an answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.amounts import draw_count
from loadtest.client import Reply
from loadtest.scenario import Traffic
from loadtest.texts import Gauge, excerpt
from loadtest.traces import MOONCAKE_BLOCK_TOKENS, TraceRequest

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "string", "description": meaning}},
                "required": [argument],
            },
        },
    }
    for name, description, argument, meaning in (
        ("read_file", "Read a file of the project.", "path", "Path from the project's root."),
        ("search", "Find text in the project.", "text", "What to look for."),
        ("run", "Run a shell command and take its output.", "command", "The command line."),
        ("write_file", "Replace a file of the project.", "path", "Path from the project's root."),
    )
]
_TOOL_RESULT_WORDS = 40
# All conversations of a tenant begin their system prompt here in the text.
_SYSTEM_START = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """One request to be sent: ``path`` is below the base URL. ``words`` are those of ``prompt_tokens``."""

    path: str
    body: dict[str, Any]
    turn: int
    prompt_tokens: int
    words: int


class Workload:
    """Makes the conversations of a scenario, the same ones for the same seed."""

    def __init__(
        self,
        traffic: Sequence[Traffic],
        model: str,
        gauges: Mapping[str, Gauge],
        seed: int,
        *,
        ignore_eos: bool,
    ) -> None:
        """``gauges`` are keyed by :func:`gauge_key`; ``ignore_eos`` says whether the server knows it."""
        self.traffic = tuple(traffic)
        self.gauges = gauges
        self._model = model
        self._seed = seed
        self._ignore_eos = ignore_eos
        # Of the users so far: whose each is, and how many each traffic has.
        self._owners: list[int] = []
        self._counts = [0] * len(self.traffic)

    def traffic_of_user(self, number: int) -> Traffic:
        """Whose user this is: any first n users are split by weight as evenly as whole users can be."""
        while len(self._owners) <= number:
            shares = [(n + 1) / t.weight for n, t in zip(self._counts, self.traffic, strict=True)]
            chosen = shares.index(min(shares))
            self._counts[chosen] += 1
            self._owners.append(chosen)
        return self.traffic[self._owners[number]]

    def traffic_of_arrival(self, rng: random.Random) -> Traffic:
        """Whose request arrives next."""
        return rng.choices(self.traffic, [traffic.weight for traffic in self.traffic])[0]

    def conversation(self, traffic: Traffic, number: int) -> Conversation:
        """The conversation of that number."""
        return Conversation(self, traffic, number, random.Random(f"{self._seed}/{number}"))

    def replayed(self, request: TraceRequest, number: int) -> tuple[Traffic, Request]:
        """A request of a trace, with our text. Equal blocks of a trace become equal text."""
        rng = random.Random(f"{self._seed}/{number}")
        traffic = self.traffic_of_arrival(rng)
        gauge = self.gauges[gauge_key(traffic)]
        if not request.blocks:
            conversation = self.conversation(traffic, number)
            return traffic, conversation.ask(request.prompt_tokens, request.output_tokens)
        parts, words = [], 0
        left = request.prompt_tokens - gauge.overhead_tokens
        for block in request.blocks:
            tokens = min(MOONCAKE_BLOCK_TOKENS, left)
            if tokens <= 0:
                break
            start = random.Random(f"{self._seed}/block {block}").randrange(1 << 30)
            count = gauge.words_for(tokens, start)
            parts.append(excerpt(gauge.kind, start, count))
            words += count
            left -= tokens
        text = "\n".join(parts)
        body = self.body(traffic, [{"role": "user", "content": text}], request.output_tokens)
        return traffic, Request(path_of(traffic), body, 0, request.prompt_tokens, words)

    def body(
        self, traffic: Traffic, messages: list[dict[str, Any]], output_tokens: int
    ) -> dict[str, Any]:
        """A request's body."""
        body: dict[str, Any] = {"model": self._model, "max_tokens": output_tokens, **traffic.fields}
        if traffic.endpoint == "chat":
            body["messages"] = messages
        else:
            body["prompt"] = messages[-1]["content"]
        if traffic.tools:
            body["tools"] = _TOOLS
        if self._ignore_eos and traffic.ignore_eos:
            body["ignore_eos"] = True
        return body


class Conversation:
    """Requests that follow each other, each with all that was said before."""

    def __init__(
        self, workload: Workload, traffic: Traffic, number: int, rng: random.Random
    ) -> None:
        self.traffic = traffic
        self._workload = workload
        self._number = number
        self._rng = rng
        self._gauge = workload.gauges[gauge_key(traffic)]
        self._turns_left = draw_count(traffic.turns, rng)
        self._turn = 0
        self._messages: list[dict[str, Any]] = []
        if traffic.system_prompt_tokens:
            words = self._gauge.words_for(traffic.system_prompt_tokens, _SYSTEM_START)
            system = excerpt(self._gauge.kind, _SYSTEM_START, words)
            self._messages.append({"role": "system", "content": f"{traffic.tenant}: {system}"})

    @property
    def over(self) -> bool:
        """Whether its last request has been made."""
        return not self._turns_left

    def think_seconds(self) -> float:
        """The pause before the next request."""
        return self.traffic.think_seconds.draw(self._rng)

    def next(self) -> Request:
        """The next turn's request."""
        prompt_tokens = draw_count(self.traffic.prompt_tokens, self._rng)
        return self.ask(prompt_tokens, draw_count(self.traffic.output_tokens, self._rng))

    def ask(self, prompt_tokens: int, output_tokens: int) -> Request:
        """A request of given lengths."""
        self._turns_left -= 1
        # The number comes first, so that a server's prefix cache finds nothing of one prompt in another.
        heading = f"{self._number}: " if self._turn == 0 else ""
        overhead = self._gauge.overhead_tokens if self._turn == 0 else 0
        start = self._rng.randrange(1 << 30)
        words = self._gauge.words_for(prompt_tokens - overhead, start)
        if not self._messages or self._messages[-1]["role"] != "tool":
            text = heading + excerpt(self._gauge.kind, start, words).rstrip()
            self._messages.append({"role": "user", "content": text})
        body = self._workload.body(self.traffic, list(self._messages), output_tokens)
        request = Request(path_of(self.traffic), body, self._turn, prompt_tokens, words)
        self._turn += 1
        return request

    def answered(self, reply: Reply) -> None:
        """What the server said becomes part of what is sent next; tools it called have their results."""
        calls = reply.tool_calls if all(map(_complete, reply.tool_calls)) else []
        message: dict[str, Any] = {"role": "assistant", "content": reply.text or "(nothing)"}
        if calls:
            message["tool_calls"] = calls
        self._messages.append(message)
        for call in calls:
            result = excerpt("prose", self._rng.randrange(1 << 30), _TOOL_RESULT_WORDS)
            self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


def _complete(call: Mapping[str, Any]) -> bool:
    """Whether a call was not cut off by max_tokens."""
    try:
        return isinstance(json.loads(call["function"]["arguments"]), dict)
    except ValueError:
        return False


def path_of(traffic: Traffic) -> str:
    """Where its requests go, below the base URL."""
    return "/chat/completions" if traffic.endpoint == "chat" else "/completions"


def gauge_key(traffic: Traffic) -> str:
    """Traffic of one key is counted alike."""
    return f"{traffic.endpoint}/{traffic.text}"
