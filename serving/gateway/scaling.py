"""How many replicas of each model take requests: more while there is much to do, fewer when there is not.

The policy decides from what waits and what is under way; the scaler has the fleet do it. A replica that is to go
gets no more requests, and is unloaded with the last of those it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.config import ScalingConfig
from serving.engines.supervisor import Engine, EngineStartError, EngineState
from serving.gateway.admission import Admission
from serving.gateway.fleet import Fleet
from serving.gateway.routing import is_replica

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
# How long a replica that could not be loaded is left alone.
_PAUSE_SECONDS = 30.0
# What remains after one has gone is to have this share of what brings one more: else they come and go.
_CALM_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What a model's replicas have to do together; ``ready`` of the ``wanted`` ones take requests."""

    ready: int
    wanted: int
    least: int
    most: int
    waiting: int
    tokens: int


@dataclass(slots=True)
class Policy:
    """Decides for one model, from one look to the next. Moments are of one clock."""

    _busy_since: float | None = field(default=None, init=False)
    _calm_since: float | None = field(default=None, init=False)

    def change(self, now: float, load: Load, scaling: ScalingConfig) -> int:
        """1 for one more replica, -1 for one fewer, 0 to leave it."""
        is_busy = load.ready > 0 and (
            load.waiting >= scaling.waiting_requests * load.ready
            or load.tokens >= scaling.outstanding_tokens * load.ready
        )
        remaining = load.wanted - 1
        is_calm = not load.waiting and (
            load.tokens <= _CALM_SHARE * scaling.outstanding_tokens * remaining
        )
        self._busy_since = (
            (self._busy_since if self._busy_since is not None else now) if is_busy else None
        )
        self._calm_since = (
            (self._calm_since if self._calm_since is not None else now) if is_calm else None
        )
        if load.wanted < load.least:
            return 1
        # While one more is on its way, nothing is known of what is needed beside it.
        if load.ready < load.wanted:
            return 0
        if _lasts(self._busy_since, now, scaling.up_after_seconds) and load.wanted < load.most:
            self._busy_since = None
            return 1
        if _lasts(self._calm_since, now, scaling.down_after_seconds) and load.wanted > load.least:
            self._calm_since = None
            return -1
        return 0


def _lasts(since: float | None, now: float, seconds: float) -> bool:
    return since is not None and now - since >= seconds


class Scaler:
    """Has the fleet do what the policies decide."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        engines: Callable[[], Sequence[Engine]],
        scaling: Callable[[], ScalingConfig],
    ) -> None:
        """``engines`` are those that requests go to now."""
        self._fleet = fleet
        self._admission = admission
        self._engines = engines
        self._scaling = scaling
        self._policies: defaultdict[str, Policy] = defaultdict(Policy)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._retry_at: dict[str, float] = {}

    async def run(self) -> None:
        """Look at all replicas now and then, until cancelled."""
        try:
            while True:
                self._look()
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _look(self) -> None:
        replicas: defaultdict[str, list[Engine]] = defaultdict(list)
        for engine in self._engines():
            if is_replica(engine):
                replicas[engine.model.served_name].append(engine)
        now = time.monotonic()
        for name, engines in replicas.items():
            wanted = [each for each in engines if each.is_expected]
            change = self._policies[name].change(now, self._load(engines, wanted), self._scaling())
            if change > 0:
                self._add(now, engines)
            elif change < 0:
                leaver = min(wanted, key=self._admission.outstanding_tokens)
                _log.info(
                    "%s: it is not needed any more, and goes when it is idle", leaver.model.name
                )
                leaver.is_expected = False
            for engine in engines:
                if not engine.is_expected and engine.is_loaded and self._is_idle(engine):
                    self._begin(engine, self._fleet.unload(engine))
                elif engine.is_expected and engine.state is EngineState.UNLOADED:
                    # A reload wanted it while it was going.
                    self._begin(engine, self._fleet.load(engine))

    def _load(self, engines: Sequence[Engine], wanted: Sequence[Engine]) -> Load:
        model = engines[0].model
        return Load(
            ready=sum(each.endpoint is not None for each in wanted),
            wanted=len(wanted),
            least=model.replicas,
            most=model.most_replicas,
            waiting=sum(map(self._admission.waiting, engines)),
            tokens=sum(map(self._admission.outstanding_tokens, engines)),
        )

    def _add(self, now: float, engines: Sequence[Engine]) -> None:
        """Want one more: best one that is still loaded, since it was about to go."""
        could = [
            each
            for each in engines
            if not each.is_expected
            and self._retry_at.get(each.id, now) <= now
            and each.id not in self._tasks
        ]
        if not could:
            return
        engine = max(could, key=lambda each: each.is_loaded)
        _log.info("%s: there is much to do: it is wanted, too", engine.model.name)
        engine.is_expected = True
        if not engine.is_loaded:
            self._begin(engine, self._fleet.load(engine))

    def _is_idle(self, engine: Engine) -> bool:
        return not self._admission.in_flight(engine) and not self._admission.waiting(engine)

    def _begin(self, engine: Engine, work: Coroutine[Any, Any, None]) -> None:
        if engine.id in self._tasks:
            work.close()
            return
        self._tasks[engine.id] = asyncio.create_task(self._finish(engine, work))

    async def _finish(self, engine: Engine, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
            self._retry_at.pop(engine.id, None)
        except EngineStartError as error:
            _log.error("%s", error)
            engine.is_expected = False
            self._retry_at[engine.id] = time.monotonic() + _PAUSE_SECONDS
        finally:
            del self._tasks[engine.id]
