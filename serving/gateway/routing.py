"""From a model's name to the engine that serves it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from serving.engines.supervisor import Endpoint, Engine, EngineState
from serving.protocol.errors import ApiError

_RETRY_AFTER_SECONDS = 2


class Router:
    """Names and aliases of all models, and names of their adapters."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self._by_name = {
            name: engine
            for engine in engines
            for name in (engine.model.name, *engine.model.aliases, *adapters_of(engine))
        }

    @property
    def names(self) -> list[str]:
        """All names clients may ask for, aliases and adapters included."""
        return list(self._by_name)

    def find(self, name: str) -> Engine:
        """The engine of a model; raises :class:`ApiError` (404) that lists near names."""
        engine = self._by_name.get(name)
        if engine is not None:
            return engine
        near = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"served: {', '.join(self.names)}."
        raise ApiError(
            404,
            f"The model '{name}' does not exist; {hint}",
            param="model",
            code="model_not_found",
        )


def adapters_of(engine: Engine) -> list[str]:
    """The names of an engine's LoRA adapters. The engine knows them, as it does its model's, but no aliases."""
    return [adapter.name for adapter in engine.model.adapters]


def own_name_of(engine: Engine, name: str) -> str:
    """The name of the model, or of the adapter, that answers to ``name``: ``name`` itself unless it is an alias."""
    return name if name in adapters_of(engine) else engine.model.name


def endpoint_of(engine: Engine) -> Endpoint:
    """Where the engine takes requests; raises :class:`ApiError` (503) while it does not."""
    endpoint = engine.endpoint
    if endpoint is not None:
        return endpoint
    doing = {
        EngineState.UNLOADED: "is not loaded",
        EngineState.UNLOADING: "is being unloaded",
        EngineState.PREPARING: "is being prepared",
        EngineState.STARTING: "is loading",
        EngineState.BACKOFF: "has crashed and is being started again",
    }.get(engine.state, "is shutting down")
    raise ApiError(
        503,
        f"The model '{engine.model.name}' {doing}; try again in a moment.",
        code="model_not_ready",
        retry_after_seconds=_RETRY_AFTER_SECONDS,
    )
