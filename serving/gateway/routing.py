"""From a model's name to what serves it: an engine of this machine, a remote, or a route over several of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
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
        self._backends: dict[str, Backend] = {
            name: backend
            for backend in self.backends
            for name in (backend.model.name, *backend.model.aliases, *adapters_of(backend))
        }
        self._by_name: dict[str, Backend | Route] = {
            **self._backends,
            **{route.name: self._route(route) for route in routes},
        }

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

    def _route(self, route: RouteConfig) -> Route:
        named = [
            *((target.model, Role.TARGET, target.weight) for target in route.targets),
            *((name, Role.FALLBACK, None) for name in route.fallback),
            *((name, Role.SPILL_OVER, None) for name in route.spill_over),
        ]
        candidates = tuple(
            Candidate(own_name_of(self._backends[name], name), self._backends[name], role, weight)
            for name, role, weight in named
        )
        return Route(route.name, candidates, route.max_wait_seconds)


def adapters_of(backend: Backend) -> list[str]:
    """The names of an engine's LoRA adapters. The engine knows them, as it does its model's, but no aliases."""
    return [adapter.name for adapter in backend.model.adapters]


def adapter_of(backend: Backend, name: str) -> str | None:
    """The adapter that ``name`` is; None if it is the model itself."""
    return name if name in adapters_of(backend) else None


def own_name_of(found: Backend | Route, name: str) -> str:
    """The name of the model, adapter or route that answers to ``name``: ``name`` itself unless it is an alias."""
    if isinstance(found, Route):
        return found.name
    return name if name in adapters_of(found) else found.model.name


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
        f"The model '{backend.model.name}' {doing}; try again in a moment.",
        code="model_not_ready",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )
