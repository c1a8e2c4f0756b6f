"""Takes up a changed config while the server runs: all of it, or nothing.

The new file is validated as at the start. Changed and added engines are started beside the old ones where
there is room; then everything turns over in one step. Old engines finish what they work on, and go.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from serving.adapters.added import AddedAdapter, with_added
from serving.config import (
    AnyModel,
    Config,
    ConfigError,
    ModelConfig,
    RangesConfig,
    RemoteModel,
    ScalingConfig,
    load_config,
    located,
    with_replicas,
)
from serving.cost.model import CostModel
from serving.cost.price_data import PriceDataError, price_data
from serving.cost.prices import PriceBook, UnknownModel
from serving.engines.adapters import AdapterError
from serving.engines.launch import Files
from serving.engines.remote import Remote
from serving.engines.supervisor import (
    Engine,
    EngineStartError,
    EngineState,
    NoRoomError,
    Supervisor,
)
from serving.gateway.filters import filters_of
from serving.gateway.fleet import Traffic
from serving.gateway.intake import Gateway
from serving.gateway.routing import Router
from serving.gateway.spending import prices_of
from serving.models.sources import ModelError

_log = logging.getLogger(__name__)

_WATCH_INTERVAL_SECONDS = 1.0
_DRAIN_INTERVAL_SECONDS = 0.1
_ON_THEIR_WAY_SECONDS = 1.0

# Settings beside the models' that apply from the next request on. All others need a restart.
_AT_ONCE = {
    "server.body_timeout_seconds",
    "server.drain_timeout_seconds",
    "server.lenient",
    "server.max_body_bytes",
    "server.watch_config",
    "memory.budget_mib",
    "memory.gpu_reserve_mib",
    "memory.max_wait_seconds",
    "memory.reserve_mib",
    "cost.cache_hits_there",
    "cost.carbon_grams_per_kwh",
    "cost.compare_to",
    "cost.cooling_overhead",
    "cost.currencies",
    "cost.currency",
    "cost.electricity_usd_per_kwh",
    "cost.hardware_price_usd",
    "cost.lifetime_years",
    "cost.maintenance_share_per_year",
    "cost.power.idle_watts",
    "cost.prices",
    *(f"cost.ranges.{name}" for name in RangesConfig.model_fields),
    "cost.resale_usd",
    "cost.tariff",
    "cost.tokens_there_per_token",
    "cost.utilization",
    "cluster.update",
    "routes",
    *(f"scaling.{name}" for name in ScalingConfig.model_fields),
}


class ReloadError(Exception):
    """The new config cannot be taken up; nothing has changed. The message says why."""


class HalfReloadedError(ReloadError):
    """Some replicas were renewed, and the next one could not be; those that are left serve as before."""


# Why a config is not taken up.
_REASONS = (
    ConfigError,
    AdapterError,
    EngineStartError,
    ModelError,
    PriceDataError,
    ReloadError,
    UnknownModel,
)


@dataclass(frozen=True, slots=True)
class Changes:
    """What a new config changes: names of models, and dotted keys of settings.

    ``restarted`` models get another engine; ``updated`` ones keep theirs.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        told = [f"{kind}: {', '.join(names)}" for kind, names in asdict(self).items() if names]
        return "; ".join(told) or "nothing"


@dataclass(frozen=True, slots=True)
class ReloadStatus:
    """How the last reload went; ``at_unix`` is when. The config of the start counts as one that went well."""

    ok: bool
    at_unix: float
    message: str
    changes: Changes = Changes()


def changes_of(
    old: Config, new: Config, needs_restart: Callable[[ModelConfig, ModelConfig], bool]
) -> Changes:
    """What ``new`` changes; raises :class:`ReloadError` if it is among that what only a restart can change."""
    settings = [key for key in _changed_keys(old, new) if key != "models"]
    refused = [key for key in settings if key not in _AT_ONCE]
    if refused:
        raise ReloadError(f"only a restart can change {', '.join(refused)}")
    before = {model.name: model for model in old.models}
    after = {model.name: model for model in new.models}
    both = [name for name in after if name in before and before[name] != after[name]]

    def restarts(old_model: AnyModel, new_model: AnyModel) -> bool:
        if isinstance(old_model, RemoteModel) or isinstance(new_model, RemoteModel):
            return old_model.engine != new_model.engine
        return needs_restart(old_model, new_model)

    restarted = [name for name in both if restarts(before[name], after[name])]
    return Changes(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        restarted=tuple(restarted),
        updated=tuple(name for name in both if name not in restarted),
        settings=tuple(settings),
    )


def steps_of(old: Config, new: Config, renewed: Collection[str], *, in_place: bool) -> list[Config]:
    """The configs to take up one after the other to come from one to the other; the last of them is ``new``.

    Of the replicas named in ``renewed``, each step renews one of each model. ``in_place``: those of models that have
    others are taken out in a step before. Everything else changes with the first.
    """
    before = {model.name: model for model in old.models}
    rounds: dict[str, list[str]] = defaultdict(list)
    for model in new.models:
        if model.name in renewed and model.name != model.served_name:
            rounds[model.served_name].append(model.name)
    steps: list[Config] = []
    for turn in range(max(map(len, rounds.values()), default=0)):
        later = {name for names in rounds.values() for name in names[turn + 1 :]}
        now = {names[turn] for names in rounds.values() if len(names) > 1 and turn < len(names)}
        models = [before[model.name] if model.name in later else model for model in new.models]
        if in_place and now:
            without = tuple(model for model in models if model.name not in now)
            steps.append(new.model_copy(update={"models": without}))
        steps.append(new.model_copy(update={"models": tuple(models)}))
    return [*steps[:-1], new]


class Reloader:
    """Keeps the running server as its config file says, and with the adapters that were added beside it."""

    def __init__(
        self,
        file: Path,
        config: Config,
        added: Sequence[AddedAdapter],
        supervisor: Supervisor,
        gateway: Gateway,
        traffic: Traffic,
        filled: Callable[[Config], Config],
    ) -> None:
        """``config`` is what ``file`` held when the server started; the server has it :func:`with_added`.

        ``filled`` puts numbers where a config leaves them open; it may take long, and raises as loading does.
        """
        self.added = tuple(added)
        with_its_adapters, self.left_out = with_added(config, added)
        self.config = with_replicas(with_its_adapters)
        self._file_config = config
        self.status = ReloadStatus(True, time.time(), "as at the start")
        self._file = file
        self._supervisor = supervisor
        self._gateway = gateway
        self._traffic = traffic
        self._filled = filled
        self._lock = asyncio.Lock()
        self._asked = asyncio.Event()
        self._follow_up: set[asyncio.Task[None]] = set()
        self._settling: dict[Engine, asyncio.Task[None]] = {}
        # Engines of a config that is being taken up.
        self._fresh: tuple[Engine, ...] = ()
        self._digest = _digest(file)
        gateway.metrics.reloaded(ok=True, at_unix=self.status.at_unix)

    def ask(self) -> None:
        """Have :meth:`run` reload soon, as SIGHUP does."""
        self._asked.set()

    async def run(self) -> None:
        """Reload when asked, and when the file has changed, until cancelled."""
        seen = _stamp(self._file)
        while True:
            try:
                async with asyncio.timeout(_WATCH_INTERVAL_SECONDS):
                    await self._asked.wait()
            except TimeoutError:
                # A file that is still being written is looked at when it has come to rest.
                before, seen = seen, _stamp(self._file)
                if not self.config.server.watch_config or before != seen or not self._is_new():
                    continue
            self._asked.clear()
            await self.reload()

    async def reload(self) -> ReloadStatus:
        """Take the file up as it is now; the status tells how that went, as do the log and metrics."""
        async with self._lock:
            self._digest = _digest(self._file)
            changes = Changes()
            try:
                new = await asyncio.to_thread(load_config, self._file)
                new = await asyncio.to_thread(self._filled, new)
                changes = await self._take_up(new, self.added)
                ok, message = True, f"changed {changes}"
                _log.info("reloaded %s: %s", self._file, message)
            except HalfReloadedError as error:
                ok, message = False, str(error)
                _log.error("%s was reloaded in part: %s", self._file, message)
            except _REASONS as error:
                ok, message = False, str(error)
                _log.error("%s was not reloaded, nothing has changed: %s", self._file, message)
            except Exception as error:
                ok, message = False, f"it failed inside rigserve: {error!r}"
                _log.exception("%s was not reloaded", self._file)
            self.status = ReloadStatus(ok, time.time(), message, changes)
            self._gateway.metrics.reloaded(ok=ok, at_unix=self.status.at_unix)
            return self.status

    async def serve_added(self, added: Sequence[AddedAdapter]) -> Changes:
        """Serve these beside the config as it was last taken up, in place of those that were added before.

        Raises ``ModelError``, ``AdapterError``, ``EngineStartError`` or :class:`ReloadError`; then nothing has changed.
        """
        async with self._lock:
            return await self._take_up(self._file_config, added)

    def to_json(self) -> dict[str, Any]:
        """The status, what of it the file has left behind, and which engines come and finish their last requests."""
        known = {*self._gateway.router.engines, *self._fresh}
        leaving = [e.model.name for e in self._supervisor.engines if e not in known]
        return {
            "file": str(self._file),
            "reloading": self._lock.locked(),
            "file_changed": self._is_new(),
            "ok": self.status.ok,
            "at_unix": self.status.at_unix,
            "message": self.status.message,
            "changes": asdict(self.status.changes),
            "starting": [engine.model.name for engine in self._fresh],
            "draining": leaving,
        }

    async def _take_up(self, of_file: Config, added: Sequence[AddedAdapter]) -> Changes:
        with_its_adapters, left_out = with_added(of_file, added)
        new = with_replicas(with_its_adapters)
        changes = self._changes_to(new)
        with located(self._file):
            filters_of(with_its_adapters.models, lenient=new.server.lenient)
        renewed = [
            engine.model.name
            for engine in self._gateway.router.engines
            if engine.model.name in changes.restarted and engine.is_loaded
        ]
        steps = steps_of(self.config, new, renewed, in_place=new.cluster.update == "in_place")
        for number, step in enumerate(steps):
            try:
                follow_up = await self._turn_over(step)
                if step is not new:
                    # The next one may need the room.
                    await follow_up
            except _REASONS as error:
                if not number:
                    raise
                raise HalfReloadedError(
                    f"{number} of {len(steps)} steps were taken, then: {error}; mend it, and reload again"
                ) from error
        self.left_out = left_out
        self._file_config, self.added = of_file, tuple(added)
        return changes

    def _changes_to(self, new: Config) -> Changes:
        engines = {engine.model.name: engine for engine in self._gateway.router.engines}
        return changes_of(
            *(self.config, new),
            lambda before, after: self._supervisor.needs_restart(engines[before.name], after),
        )

    async def _turn_over(self, new: Config) -> asyncio.Task[None]:
        """Take up one config in whole; gives what is done when those that leave have left. Raises as :meth:`serve_added`."""
        data = price_data(Path(new.storage.data_dir))
        prices = PriceBook(new.cost.compare_to, overrides=new.cost.prices, data=data)
        api_prices = prices_of(new.remote_models, data)
        supervisor = self._supervisor
        old = {engine.model.name: engine for engine in self._gateway.router.engines}
        changes = self._changes_to(new)
        fresh = {
            model.name: supervisor.make(model)
            for model in new.local_models
            if model.name in (*changes.added, *changes.restarted)
        }
        engines = [fresh.get(model.name) or old[model.name] for model in new.local_models]
        before = self._gateway.router.remotes
        # What has not changed keeps what its breaker has learnt.
        remotes = [
            next((remote for remote in before if remote.model == model), None) or Remote(model)
            for model in new.remote_models
        ]
        files = await _files_with_adapters(new, old, changes.updated)
        leaving = [engine for name, engine in old.items() if name in fresh or engine not in engines]
        self._fresh = tuple(fresh.values())
        supervisor.add(self._fresh)
        supervisor.memory = new.memory
        try:
            later = await self._start(fresh.values(), old, leaving)
            for engine, each in files.items():
                if engine.is_loaded:
                    await engine.ready()
                    await engine.live_adapters.load(each.adapters)
        except BaseException:
            supervisor.memory = self.config.memory
            self._settle(files)
            self._fresh = ()
            await supervisor.remove(fresh.values())
            raise
        # Nothing is awaited from here on: a request sees all of the old config or all of the new.
        adapted: list[Engine] = []
        for engine, model in zip(engines, new.local_models, strict=True):
            if model.load == "preload" and engine.model.load != "preload":
                later.append(engine)
            if model.memory_mib != engine.model.memory_mib:
                engine.footprint = None
            if model.adapters != engine.model.adapters:
                engine.take_up(model, files.get(engine))
                adapted.append(engine)
            engine.model = model
            # As many replicas as before: how many are needed is not for the config to say.
            was_wanted = model.is_replica and model.name in old and old[model.name].is_expected
            engine.is_expected = model.load == "preload" or was_wanted
        self._gateway.configure(Router(engines, remotes, new.routes), new.server)
        self._fresh = ()
        self._gateway.relay.spending.configure(api_prices)
        for remote in before:
            if remote not in remotes:
                self._gateway.relay.admission.forget(remote)
        self._gateway.meter.configure(CostModel(new.cost), prices)
        self.config = new
        self._settle(adapted)
        return self._afterwards(leaving, later)

    async def _start(
        self, fresh: Iterable[Engine], old: dict[str, Engine], leaving: list[Engine]
    ) -> list[Engine]:
        """Start new engines beside the old; gives those that find room only when others have left."""
        later = []
        pinned_leave = any(engine.model.pinned for engine in leaving)
        for engine in fresh:
            name = engine.model.name
            replaces_loaded = name in old and old[name].is_loaded
            if engine.model.load != "preload" and not replaces_loaded:
                continue
            if replaces_loaded and engine.model.port == old[name].model.port is not None:
                later.append(engine)
                continue
            try:
                await self._supervisor.load(engine)
            except NoRoomError as error:
                if error.is_final and not pinned_leave:
                    raise
                later.append(engine)
        return later

    def _settle(self, engines: Iterable[Engine]) -> None:
        """Have engines come to the adapters that they are to serve."""
        for engine in set(engines) - self._settling.keys():
            self._settling[engine] = asyncio.create_task(self._settled(engine))
            self._settling[engine].add_done_callback(partial(self._has_settled, engine))

    def _has_settled(self, engine: Engine, _: asyncio.Task[None]) -> None:
        del self._settling[engine]

    async def _settled(self, engine: Engine) -> None:
        """Until an engine's process has its adapters and no others; one that is in use goes with its last request."""
        told = False
        while engine.is_loaded:
            try:
                await engine.prepare()
                # Not while others are being loaded, which are not among its files yet.
                async with self._lock:
                    if engine.endpoint is not None and await self._is_settled(engine):
                        return
            except (AdapterError, ModelError) as error:
                if not told:
                    _log.warning("%s: its adapters: %s; trying again", engine.model.name, error)
                told = True
            await asyncio.sleep(_ON_THEIR_WAY_SECONDS if told else _DRAIN_INTERVAL_SECONDS)

    async def _is_settled(self, engine: Engine) -> bool:
        wanted, live = (await engine.prepare()).adapters, engine.live_adapters
        # It may have been started again in the midst of a change.
        await live.load(wanted)
        for name in live.beside(wanted):
            if not self._traffic.requests_with(engine, name):
                await live.drop(name)
        for each in live.replaced:
            if self._traffic.oldest_with(engine, each.name) > each.at:
                await live.let_go(each)
        return not live.beside(wanted) and not live.replaced

    def _afterwards(self, leaving: list[Engine], later: list[Engine]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._let_go(leaving, later))
        self._follow_up.add(task)
        task.add_done_callback(self._follow_up.discard)
        return task

    async def _let_go(self, leaving: list[Engine], later: list[Engine]) -> None:
        """End engines as they become idle; then load those that waited for their room."""
        remaining = list(leaving)
        # Requests that have found their engine, and are on their way to it.
        await asyncio.sleep(_ON_THEIR_WAY_SECONDS if leaving else 0)
        while remaining:
            idle = [engine for engine in remaining if not self._is_busy(engine)]
            await self._supervisor.remove(idle)
            remaining = [engine for engine in remaining if engine not in idle]
            if remaining:
                await asyncio.sleep(_DRAIN_INTERVAL_SECONDS)
        for engine in later:
            try:
                await self._supervisor.load(engine, lambda other: not self._is_busy(other))
            except EngineStartError as error:
                _log.error("after the reload: %s", error)

    def _is_busy(self, engine: Engine) -> bool:
        return bool(self._traffic.in_flight(engine) or self._traffic.waiting(engine))

    def _is_new(self) -> bool:
        return _digest(self._file) != self._digest


async def _files_with_adapters(
    new: Config, old: Mapping[str, Engine], updated: Iterable[str]
) -> dict[Engine, Files]:
    """The files of engines whose adapters change while they go on; raises ``ModelError``.

    Not of those that have prepared none yet: they will.
    """
    return {
        old[model.name]: await old[model.name].prepare_for(model)
        for model in new.local_models
        if model.name in updated
        and model.adapters != old[model.name].model.adapters
        and not (old[model.name].files is None and old[model.name].state is EngineState.UNLOADED)
    }


def _changed_keys(old: BaseModel, new: BaseModel, parent: str = "") -> Iterator[str]:
    for name in type(old).model_fields:
        before, after = getattr(old, name), getattr(new, name)
        if before == after:
            continue
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            yield from _changed_keys(before, after, f"{parent}{name}.")
        else:
            yield f"{parent}{name}"


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None while there is none."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _digest(file: Path) -> bytes | None:
    try:
        return hashlib.sha256(file.read_bytes()).digest()
    except OSError:
        return None
