"""From a model's name to what serves it: an engine of this machine, a remote, or a route over several of them."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from serving.config import RouteConfig
from serving.engines.remote import Remote
from serving.engines.supervisor import Endpoint, Engine, EngineState
from serving.protocol.errors import ApiError

_RETRY_AFTER_SECONDS = 2

# What answers requests for one model.
Backend = Engine | Remote


class Role(Enum):
    """As what a backend serves a route."""

    TARGET = "target"
    FALLBACK = "fallback"
    SPILL_OVER = "spill_over"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that may serve a route's request, by the ``name`` (of a model or adapter) that it knows."""

    name: str
    backend: Backend
    role: Role
    weight: float | None = None

    @property
    def place(self) -> str:
        """Where a conversation is warm: replicas know one name, and each has a cache of its own."""
        return f"{self.name}@{self.backend.model.name}" if is_replica(self.backend) else self.name


@dataclass(frozen=True, slots=True)
class Route:
    """A name that is served by several backends. Targets come first, then fallbacks, then what costs money."""

    name: str
    candidates: tuple[Candidate, ...]
    max_wait_seconds: float | None


class Router:
    """Names and aliases of all models, names of their adapters, and of routes."""

    def __init__(
        self,
        engines: Sequence[Engine],
        remotes: Sequence[Remote] = (),
        routes: Sequence[RouteConfig] = (),
    ) -> None:
        """``routes`` lead to models that are there: :func:`serving.config.load_config` sees to it."""
        self.engines = engines
        self.remotes = remotes
        # Replicas share their names.
        self._backends: dict[str, list[Backend]] = defaultdict(list)
        for backend in self.backends:
            model = backend.model
            for name in (model.served_name, *model.aliases, *adapters_of(backend)):
                self._backends[name].append(backend)
        self._by_name: dict[str, Backend | Route] = {
            **{name: self._found(name) for name in self._backends},
            **{route.name: self._route(route) for route in routes},
        }
        self._replicas = {each.model.name: each for each in engines if is_replica(each)}

    @property
    def backends(self) -> tuple[Backend, ...]:
        """One for each model of the config."""
        return (*self.engines, *self.remotes)

    @property
    def names(self) -> list[str]:
        """All names clients may ask for: of models, aliases, adapters and routes."""
        return list(self._by_name)

    def find(self, name: str) -> Backend | Route:
        """What serves a name; raises :class:`ApiError` (404) that lists near names."""
        found = self._by_name.get(name)
        if found is not None:
            return found
        near = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"served: {', '.join(self.names)}."
        raise ApiError(
            404,
            f"The model '{name}' does not exist; {hint}",
            param="model",
            code="model_not_found",
        )

    def engine(self, name: str) -> Engine:
        """The engine of a model or replica; raises :class:`ApiError`: 404 if there is none of the name, 409 if it has no engine."""
        if name in self._replicas:
            return self._replicas[name]
        found = self.find(name)
        if isinstance(found, Engine):
            return found
        there = [each.model.name for each in self._backends.get(name, ()) if is_replica(each)]
        mend = f"; its replicas are {', '.join(there)}" if there else ""
        raise ApiError(
            409, f"'{name}' has no engine of its own on this machine{mend}.", code="no_engine"
        )

    def _found(self, name: str) -> Backend | Route:
        """The backend of a name, or a route over its replicas."""
        backends = self._backends[name]
        if not is_replica(backends[0]):
            return backends[0]
        own_name = _own_name(backends[0], name)
        return Route(own_name, tuple(_candidates(own_name, backends, Role.TARGET, None)), None)

    def _route(self, route: RouteConfig) -> Route:
        named = [
            *((target.model, Role.TARGET, target.weight) for target in route.targets),
            *((name, Role.FALLBACK, None) for name in route.fallback),
            *((name, Role.SPILL_OVER, None) for name in route.spill_over),
        ]
        candidates = [
            candidate
            for name, role, weight in named
            for candidate in _candidates(name, self._backends[name], role, weight)
        ]
        return Route(route.name, tuple(candidates), route.max_wait_seconds)


def _candidates(
    name: str, backends: Sequence[Backend], role: Role, weight: float | None
) -> Iterable[Candidate]:
    """The backends that have a name."""
    return (Candidate(_own_name(backend, name), backend, role, weight) for backend in backends)


def is_replica(backend: Backend) -> bool:
    """Whether it is one of several engines of a model."""
    return isinstance(backend, Engine) and backend.model.is_replica


def adapters_of(backend: Backend) -> list[str]:
    """The names of an engine's LoRA adapters. The engine knows them, as it does its model's, but no aliases."""
    return [adapter.name for adapter in backend.model.adapters]


def adapter_of(backend: Backend, name: str) -> str | None:
    """The adapter that ``name`` is; None if it is the model itself."""
    return name if name in adapters_of(backend) else None


def own_name_of(found: Backend | Route, name: str) -> str:
    """The name of the model, adapter or route that answers to ``name``: ``name`` itself unless it is an alias."""
    return found.name if isinstance(found, Route) else _own_name(found, name)


def _own_name(backend: Backend, name: str) -> str:
    return name if name in adapters_of(backend) else backend.model.served_name


def label_of(found: Backend | Route) -> str:
    """What metrics call it."""
    return found.name if isinstance(found, Route) else found.model.name


def width_of(found: Backend | Route) -> int:
    """How many requests it works on at a time, without what costs money."""
    if isinstance(found, Route):
        targets = (each for each in found.candidates if each.role is Role.TARGET)
        return sum(each.backend.model.max_sequences for each in targets)
    return found.model.max_sequences


def endpoint_of(backend: Backend) -> Endpoint:
    """Where a backend takes requests; raises :class:`ApiError` (503) while it does not."""
    endpoint = backend.endpoint
    if endpoint is not None:
        return endpoint
    doing = {
        EngineState.UNLOADED: "is not loaded",
        EngineState.UNLOADING: "is being unloaded",
        EngineState.PREPARING: "is being prepared",
        EngineState.STARTING: "is loading",
        EngineState.ASLEEP: "sleeps",
        EngineState.BACKOFF: "has crashed and is being started again",
    }.get(backend.state, "is shutting down")
    raise ApiError(
        503,
        f"The model '{backend.model.served_name}' {doing}; try again in a moment.",
        code="model_not_ready",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )
