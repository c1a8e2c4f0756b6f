"""The admin API for engines: which models are loaded, and loading and unloading them."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from serving.engines.placement import HOST
from serving.engines.remote import Remote
from serving.engines.supervisor import Engine, EngineStartError, NoRoomError
from serving.gateway.fleet import Fleet, Traffic
from serving.gateway.intake import Gateway, json_response
from serving.gateway.origin import refuse_other_sites
from serving.protocol.errors import ApiError


def routes(gateway: Gateway, fleet: Fleet, traffic: Traffic) -> APIRouter:
    """What `rigserve models` shows and does."""
    router = APIRouter(
        prefix="/admin/models", tags=["models"], dependencies=[Depends(refuse_other_sites)]
    )

    @router.get("")
    async def listed() -> Response:
        """All models with their engines' states, memory and requests; engines that a reload brings or lets go come last."""
        await fleet.measure()
        served = gateway.router.engines
        leaving = [engine for engine in fleet.engines if engine not in served]
        told = [_told(engine, traffic) for engine in (*served, *leaving)]
        told += [_told_of_remote(remote, traffic) for remote in gateway.router.remotes]
        return json_response({"object": "list", "data": told})

    # Names may hold slashes.
    @router.post("/{name:path}/load")
    async def load(name: str) -> Response:
        """Have a model ready; returns when it is. Idle models leave if their room is needed."""
        engine = gateway.router.engine(name)
        try:
            await fleet.load(engine, lambda other: not _requests(other, traffic))
        except NoRoomError as error:
            raise ApiError(409, str(error), code="no_room") from error
        except EngineStartError as error:
            raise ApiError(502, str(error), code="engine_start_failed") from error
        return json_response(_told(engine, traffic))

    @router.post("/{name:path}/unload")
    async def unload(http: Request, name: str) -> Response:
        """End a model's engine; returns when its memory is free. It loads again when it is asked for.

        With requests in flight that takes `?force=true`: they break off.
        """
        engine = gateway.router.engine(name)
        force = _flag(http, "force")
        if (requests := _requests(engine, traffic)) and not force:
            raise ApiError(
                409,
                f"'{engine.model.name}' has {requests} requests in flight or waiting; "
                "try again when they are done, or add ?force=true to break them off.",
                code="model_in_use",
            )
        await fleet.unload(engine)
        return json_response(_told(engine, traffic))

    return router


def _requests(engine: Engine, traffic: Traffic) -> int:
    return traffic.in_flight(engine) + traffic.waiting(engine)


def _flag(http: Request, name: str) -> bool:
    value = http.query_params.get(name, "false")
    if value not in ("true", "false"):
        raise ApiError(400, f"'{name}' must be true or false.", param=name, code="invalid_value")
    return value == "true"


def _told_of_remote(remote: Remote, traffic: Traffic) -> dict[str, Any]:
    last_used = traffic.last_used(remote)
    in_flight, waiting = traffic.in_flight(remote), traffic.waiting(remote)
    is_idle = last_used and not in_flight and not waiting
    return {
        "id": remote.model.name,
        "object": "rigserve.remote",
        "state": f"breaker {remote.breaker.state.value}",
        "engine": remote.model.engine,
        "devices": [],
        "memory": None,
        "in_flight": in_flight,
        "waiting": waiting,
        "idle_seconds": round(time.monotonic() - last_used, 1) if is_idle else None,
        "pinned": False,
        "ttl_seconds": None,
    }


def _told(engine: Engine, traffic: Traffic) -> dict[str, Any]:
    model, footprint = engine.model, engine.footprint
    last_used, requests = traffic.last_used(engine), _requests(engine, traffic)
    is_idle = last_used and not requests
    return {
        "id": model.name,
        "object": "rigserve.engine",
        "state": engine.state.value,
        "engine": model.engine,
        "devices": list(engine.shares_mib),
        "memory": footprint
        and {
            "source": footprint.source,
            "needed_mib": {HOST: footprint.host_mib, "gpu": footprint.gpu_mib},
            "reserved_mib": dict(engine.shares_mib),
            "used_mib": dict(engine.held_mib),
        },
        "in_flight": traffic.in_flight(engine),
        "waiting": traffic.waiting(engine),
        "idle_seconds": round(time.monotonic() - last_used, 1) if is_idle else None,
        "load": model.load,
        "pinned": model.pinned,
        "ttl_seconds": model.ttl_seconds,
        "group": model.group,
        "restarts": engine.restarts,
        "failure": engine.failure,
    }
