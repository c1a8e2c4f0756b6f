"""In which order a route's models are asked: who shares the load, where a conversation stays, who comes after."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serving.engines.remote import Remote
from serving.engines.supervisor import Engine, EngineState
from serving.gateway.routing import Backend, Candidate, Role, Route, is_replica
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, ModelRequest

_CONVERSATIONS_REMEMBERED = 50_000
# Of a text's beginning: prompts that differ in their ends are warm in the same place.
_BEGINNING_CHARACTERS = 1024
_DIGEST_BYTES = 12


class Load(Protocol):
    """What backends have to do."""

    def outstanding_tokens(self, backend: Backend) -> int:
        """Tokens that requests there, and those that wait for it, are expected to take."""

    def waiting(self, backend: Backend) -> int:
        """Requests that wait for it."""

    def last_used(self, backend: Backend) -> float:
        """When it last had a request (``time.monotonic()``); 0 if never."""


@dataclass(frozen=True, slots=True)
class Marks:
    """By what a conversation is known again.

    ``whole`` is this request's; ``earlier`` was ``whole`` in the request before it in the same conversation;
    ``beginning`` is shared by all that begin alike. None where there is no such thing.
    """

    beginning: bytes | None = None
    earlier: bytes | None = None
    whole: bytes | None = None


def marks_of(route: str, asked: ModelRequest) -> Marks:
    """The marks of a request for a route."""
    digest = hashlib.blake2b(route.encode(), digest_size=_DIGEST_BYTES)
    if isinstance(asked, CompletionRequest):
        digest.update(str(asked.prompt)[:_BEGINNING_CHARACTERS].encode(errors="replace"))
        return Marks(beginning=digest.digest())
    if not isinstance(asked, ChatCompletionRequest):
        return Marks()
    beginning = earlier = None
    for message in asked.messages:
        if message.role == "assistant":
            earlier = digest.digest()
        digest.update(message.model_dump_json(exclude_none=True).encode())
        if beginning is None and message.role == "user":
            beginning = digest.digest()
    return Marks(beginning, earlier, digest.digest())


class Memory:
    """Where a conversation was answered last, for so many conversations; the oldest are forgotten."""

    def __init__(self, size: int = _CONVERSATIONS_REMEMBERED) -> None:
        self._places: OrderedDict[bytes, str] = OrderedDict()
        self._size = size

    def __len__(self) -> int:
        return len(self._places)

    def find(self, mark: bytes | None) -> str | None:
        """Where; None if it is not known."""
        return None if mark is None else self._places.get(mark)

    def keep(self, marks: Marks, place: str) -> None:
        """The conversation is warm there now."""
        for mark in (marks.beginning, marks.whole):
            if mark is not None:
                self._places[mark] = place
                self._places.move_to_end(mark)
        while len(self._places) > self._size:
            self._places.popitem(last=False)


class Balancer:
    """Orders the candidates of routes for each request."""

    def __init__(self, load: Load, rng: random.Random | None = None) -> None:
        self.memory = Memory()
        self._load = load
        self._rng = rng or random.Random()

    def order(self, route: Route, marks: Marks, *, may_spill: bool) -> list[Candidate]:
        """Who is to be asked, in turn. Those who cannot take requests now come last.

        ``may_spill``: also those that cost money.
        """
        targets = [each for each in route.candidates if each.role is Role.TARGET]
        later = [
            each
            for each in route.candidates
            if each.role is Role.FALLBACK or (each.role is Role.SPILL_OVER and may_spill)
        ]
        # A replica that is not wanted now gets no requests, and is not loaded for one.
        targets = [each for each in targets if is_wanted(each.backend)] or targets[:1]
        up = [each for each in targets if not is_down(each.backend)]
        if up and up[0].weight is not None:
            up = self._by_weight(up, marks)
        elif len(up) > 1:
            up = self._by_load(up, marks)
        down = [each for each in targets if is_down(each.backend)]
        candidates = [*up, *later, *down]
        # Waiting for an engine that is being started again helps; asking again who does not answer does not.
        return sorted(candidates, key=lambda each: _patience_needed(each.backend))

    def _by_weight(self, targets: Sequence[Candidate], marks: Marks) -> list[Candidate]:
        """At random, but a conversation that goes on stays where it is."""
        warm = self.memory.find(marks.earlier)
        first = next((each for each in targets if each.place == warm), None)
        if first is None:
            (first,) = self._rng.choices(targets, [_share(each, targets) for each in targets])
        return [first, *(each for each in targets if each is not first)]

    def _by_load(self, targets: Sequence[Candidate], marks: Marks) -> list[Candidate]:
        """Fewest tokens first; before them where the prompt's beginning is warm, unless requests queue there alone."""
        load = self._load
        ordered = sorted(
            targets,
            key=lambda each: (
                load.outstanding_tokens(each.backend),
                load.last_used(each.backend),
            ),
        )
        warm = self.memory.find(marks.earlier) or self.memory.find(marks.beginning)
        first = next((each for each in ordered if each.place == warm), None)
        if first is None:
            return ordered
        others = [each for each in ordered if each is not first]
        if load.waiting(first.backend) and not all(load.waiting(each.backend) for each in others):
            return ordered
        return [first, *others]


def _share(target: Candidate, targets: Sequence[Candidate]) -> float:
    """Its part of the weight, which replicas of a model have together."""
    assert target.weight is not None
    if not is_replica(target.backend):
        return target.weight
    return target.weight / sum(each.name == target.name for each in targets)


def is_wanted(backend: Backend) -> bool:
    """Whether it is to have requests: of replicas, as many as there is work for."""
    return not is_replica(backend) or (isinstance(backend, Engine) and backend.is_expected)


def is_down(backend: Backend) -> bool:
    """Whether a backend cannot take requests although it should. One that is loaded on demand can."""
    if isinstance(backend, Remote):
        return not backend.is_available
    is_missing = backend.is_expected and backend.endpoint is None
    return is_missing or backend.state is EngineState.BACKOFF


def _patience_needed(backend: Backend) -> int:
    if not is_down(backend):
        return 0
    return 2 if isinstance(backend, Engine) else 1
